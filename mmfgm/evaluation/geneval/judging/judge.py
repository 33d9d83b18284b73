# Copyright (c) mmfgm authors.
"""GenEval's decision on one image (Ghosh et al., 2023), from detected boxes to a verdict; no models
here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from mmfgm.errors import UsageError

from .prompts import COLORS, check_clauses

_DEFAULTS = dict(
    threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0, position_threshold=0.1
)


@dataclass(frozen=True)
class Verdict:
    """What :func:`judge` found.

    Attributes:
        correct (bool): Whether the image shows what its prompt asks for.
        reason (str): Why not, one line per failed clause in the reference's words; empty if
            correct.
        kept (dict[str, list[int]]): Class name -> rows of its detections that count, best score
            first. Classes without any are absent.
    """

    correct: bool
    reason: str
    kept: dict[str, list[int]]


def iou(box_a: Sequence[float], box_b: Sequence[float]) -> np.float32:
    """Intersection over union of two boxes ``x1, y1, x2, y2, ...`` in pixels, whose last pixel
    belongs to them.

    Computed in float32; 0 if neither box has an area.
    """
    a, b = (np.asarray(box, dtype=np.float32)[:4] for box in (box_a, box_b))

    def area(low, high):
        return np.maximum(high - low + np.float32(1), np.float32(0)).prod()

    inter = area(np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:]))
    union = area(a[:2], a[2:]) + area(b[:2], b[2:]) - inter
    return inter / union if union else np.float32(0)


def relation(
    box_a: Sequence[float], box_b: Sequence[float], position_threshold: float = 0.1
) -> list[str]:
    """Where A lies relative to B: none, one or two of left of, right of, above, below, in this
    order.

    Args:
        box_a (Sequence[float]): ``x1, y1, x2, y2, ...`` of A in pixels, y downwards.
        box_b (Sequence[float]): The same of B.
        position_threshold (float): Fraction of the summed sizes by which an offset of the centres
            is shortened.
    """
    # (box, corner, axis); float32 throughout, as the boxes of the reference are
    corners = np.stack([np.asarray(box, dtype=np.float32)[:4] for box in (box_a, box_b)]).reshape(
        2, 2, 2
    )
    centre_a, centre_b = corners.mean(axis=1)
    size_a, size_b = np.abs(corners[:, 1] - corners[:, 0])
    offset = centre_a - centre_b
    shortened = np.sign(offset) * np.maximum(
        np.abs(offset) - float(position_threshold) * (size_a + size_b), 0
    )
    if (np.abs(shortened) < 1e-3).all():
        return []
    # the norm is that of the full offset, so the components need not form a unit vector
    dx, dy = shortened / np.linalg.norm(offset)
    holds = {'left of': dx < -0.5, 'right of': dx > 0.5, 'above': dy < -0.5, 'below': dy > 0.5}
    return [name for name, true in holds.items() if true]


def _keep(boxes: np.ndarray, threshold: float, max_objects: int, max_overlap: float) -> list[int]:
    """Rows of ``boxes`` (n, 5) that count, best score first."""
    # ascending and reversed: the reference's order of equal scores
    order = np.argsort(boxes[:, 4])[::-1]
    # the threshold is rounded to float32 too: a score of float32(0.3) is not above 0.3
    order = order[boxes[order, 4] > np.float32(threshold)][:max_objects].tolist()
    if max_overlap == 1:
        return order
    kept = []
    for row in order:
        if all(iou(boxes[other], boxes[row]) < np.float32(max_overlap) for other in kept):
            kept.append(row)
    return kept


def _settings(options: dict | None) -> dict:
    options = dict(options or {})
    for name, value in options.items():
        if name not in _DEFAULTS:
            raise UsageError(
                f'unknown GenEval option {name!r}; the options are {", ".join(_DEFAULTS)}'
            )
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UsageError(f'GenEval option {name} must be a number, but is {value!r}')
    settings = {**_DEFAULTS, **options}
    if settings['max_objects'] < 0 or settings['max_objects'] != int(settings['max_objects']):
        raise UsageError(
            f'GenEval option max_objects must be a whole number, but is {settings["max_objects"]!r}'
        )
    return settings


def _boxes(name: str, rows: np.ndarray) -> np.ndarray:
    boxes = np.asarray(rows, dtype=np.float32)
    if boxes.size == 0:
        return boxes.reshape(0, 5)
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f'expected boxes (n, 5) of class {name!r}, but got {boxes.shape}')
    return boxes


def _color_reason(clause: dict, colors: list[str]) -> str | None:
    name = clause['class']
    count = clause['count']
    wanted = clause['color']
    found = colors.count(wanted)
    if found >= count:
        return None
    present = ', '.join(f'{colors.count(color)} {color}' for color in COLORS if color in colors)
    return f'expected {wanted} {name}>={count}, found {found} {wanted}; and {present}'


def _position_reason(
    clause: dict, boxes: np.ndarray, targets: np.ndarray | None, threshold: float
) -> str | None:
    name = clause['class']
    (wanted, _) = clause['position']
    if targets is None:
        return f'no target for {name} to be {wanted}'
    for box in boxes:
        for target in targets:
            found = relation(box, target, threshold)
            if wanted not in found:
                return f'expected {name} {wanted} target, found {" and ".join(found)} target'
    return None


def judge(
    metadata: dict,
    detections: dict[str, np.ndarray],
    classify_color: Callable[[str, list[int]], list[str]],
    options: dict | None = None,
) -> Verdict:
    """Decide whether an image shows what its prompt asks for, as GenEval's ``evaluate_images.py``
    does.

    Every clause is evaluated, so a verdict can have several reasons. Only the best ``count`` boxes
    of a clause are looked at for its colour and position.

    Args:
        metadata (dict): A row of the prompt file: ``tag``, ``include``, optionally ``exclude``.
        detections (dict[str, np.ndarray]): Class name -> float32 ``(n, 5)``: ``x1, y1, x2, y2`` in
            pixels and score, rows in any order.
        classify_color (Callable): Class name and rows into its array -> the colour name of each.
            Called at most once per include clause, for clauses with a colour and enough boxes.
        options (dict, optional): Any of ``threshold`` (0.3), ``counting_threshold`` (0.9, for the
            tag counting), ``max_objects`` (16, per class), ``max_overlap`` (1.0: no suppression of
            overlapping boxes of a class) and ``position_threshold`` (0.1).

    Raises:
        UsageError: If the metadata lacks a key or has a bad value, or an option is unknown or not a
            number.
        ValueError: If an array is not ``(n, 5)`` or ``classify_color`` gives another number of
            colours.
    """
    check_clauses(metadata)
    settings = _settings(options)
    threshold = settings['counting_threshold' if metadata['tag'] == 'counting' else 'threshold']
    detections = {name: _boxes(name, rows) for name, rows in detections.items()}
    kept = {
        name: _keep(boxes, threshold, int(settings['max_objects']), settings['max_overlap'])
        for name, boxes in detections.items()
    }
    kept = {name: rows for name, rows in kept.items() if rows}

    reasons = []
    groups = []
    for clause in metadata['include']:
        name = clause['class']
        count = clause['count']
        rows = kept.get(name, [])[:count]
        reason = None
        if len(rows) < count:
            reason = f'expected {name}>={count}, found {len(rows)}'
        else:
            boxes = detections[name][rows]
            if 'color' in clause:
                colors = list(classify_color(name, rows))
                if len(colors) != len(rows):
                    raise ValueError(
                        f'classify_color gave {colors} for {len(rows)} boxes of class {name!r}'
                    )
                reason = _color_reason(clause, colors)
            if 'position' in clause and reason is None:
                targets = groups[clause['position'][1]]
                reason = _position_reason(clause, boxes, targets, settings['position_threshold'])
        # a clause that failed in any way is no target for later ones
        groups.append(boxes if reason is None else None)
        if reason is not None:
            reasons.append(reason)
    for clause in metadata.get('exclude', []):
        found = len(kept.get(clause['class'], []))
        if found >= clause['count']:
            reasons.append(f'expected {clause["class"]}<{clause["count"]}, found {found}')
    return Verdict(correct=not reasons, reason='\n'.join(reasons), kept=kept)
