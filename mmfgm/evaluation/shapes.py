# Copyright (c) mmfgm authors.
"""An exact detector for captioned shapes, and GenEval's scores from what it sees."""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from mmfgm.datasets import COLORS, SHAPES, coverage
from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS, METRICS

from .features import to_uint8
from .geneval import SCORES, judge, summarize
from .metrics import GatheredMetric

# every channel of a pixel this close to a colour's, of 255; below a half, so that a pixel has one
# colour at most
TOLERANCE = 0.4 * 255
# fraction of the image; the smallest cross covers 0.037
MIN_AREA = 0.01
# of templates against the box of a mask, in pixels
SHIFTS = (-0.5, -0.25, 0, 0.25, 0.5)
GROWTHS = (-0.25, 0, 0.25, 0.5, 0.75, 1)
# of the IoU with the best template; shapes of 32 pixels reach 0.82 with noise of 10 of 255, and
# 0.88 without
THRESHOLD = 0.75

Detections = tuple[dict[str, np.ndarray], dict[str, list[str]]]


@lru_cache(
    maxsize=256
)  # a megabyte each at most for 32 pixels, and bad images have boxes of all sizes
def _templates(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each shape may look like in a box of pixels, at all places and sizes that differ by
    parts of a pixel.

    Returns:
        tuple: The shapes ``(T,)`` as indices; ``(T, height * width)`` of 0 and 1 inside the box;
            the whole areas ``(T,)``,
        which are larger where a shape sticks out.
    """
    pad = abs(height - width) + 2
    x, y = (np.arange(-pad, side + pad) + 0.5 - side / 2 for side in (width, height))
    # a box of visible pixels is smaller than the shape, most of all at the tip of the triangle
    dx, dy, dr = (v.reshape(-1, 1, 1) for v in np.meshgrid(SHIFTS, [-1, -0.75, *SHIFTS], GROWTHS))
    # a pixel counts where the colour of its blend with black passes the tolerance
    covered = np.stack(
        [coverage(shape, x - dx, y[:, None] - dy, (height + width) / 4 + dr) for shape in SHAPES]
    )
    masks = covered >= 1 - TOLERANCE / 255
    kinds = np.arange(len(SHAPES)).repeat(len(dx))
    # many fall together; sorting bits is faster than sorting pixels
    first = np.unique(
        np.packbits(masks.reshape(len(kinds), -1), axis=1), axis=0, return_index=True
    )[1]
    masks = masks.reshape(-1, len(y), len(x))[first]
    inside = masks[:, pad : pad + height, pad : pad + width]
    return kinds[first], inside.reshape(len(inside), -1).astype(np.float32), masks.sum((1, 2))


def detect(images: Tensor) -> list[Detections]:
    """Find shapes: connected pixels of one colour, named after the template they overlap most.

    Args:
        images (Tensor): ``(N, 3, H, W)`` uint8.

    Returns:
        list[tuple[dict, dict]]: For each image its detections, shape -> float32 ``(n, 5)`` of ``x1,
        y1, x2, y2`` in pixels and the IoU with the template in [0, 1] as the score, and the colours
        of these rows, shape -> names.
    """
    return [
        found for part in images.cpu().split(256) for found in _detect(part.numpy())
    ]  # bounds memory


def _detect(images: np.ndarray) -> list[Detections]:
    size = images.shape[-2:]
    palette = np.array(list(COLORS.values()), np.int16)
    distance = np.abs(images[:, None].astype(np.int16) - palette[:, :, None, None]).max(2)
    # all images and colours at once: the structure connects eight neighbours, but no two planes
    masks = (distance <= TOLERANCE).reshape(-1, *size)
    labels, n = ndimage.label(
        masks, np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
    )
    areas = np.bincount(labels.ravel(), minlength=n + 1)
    boxes = [{} for _ in images]
    colors = [{} for _ in images]
    for label, (plane, rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        height = rows.stop - rows.start
        width = columns.stop - columns.start
        # the boxes of shapes are square up to a pixel
        if (
            areas[label] < MIN_AREA * size[0] * size[1]
            or abs(height - width) > 2 + max(height, width) / 8
        ):
            continue
        mask = labels[plane, rows, columns][0] == label
        kinds, inside, whole = _templates(height, width)
        common = inside @ mask.ravel().astype(np.float32)
        iou = common / (areas[label] + whole - common)
        image, color = divmod(plane.start, len(COLORS))
        shape = SHAPES[kinds[iou.argmax()]]
        boxes[image].setdefault(shape, []).append(
            [columns.start, rows.start, columns.stop, rows.stop, iou.max()]
        )
        colors[image].setdefault(shape, []).append(list(COLORS)[color])
    return [
        ({shape: np.array(rows, np.float32) for shape, rows in b.items()}, c)
        for b, c in zip(boxes, colors)
    ]


def verdict(row: dict, found: Detections, options: dict | None = None):
    """GenEval's :class:`~mmfgm.evaluation.geneval.Verdict` on the detections of one image for a
    metadata row."""
    detections, colors = found
    return judge(
        row,
        detections,
        lambda shape, rows: [colors[shape][i] for i in rows],
        {'threshold': THRESHOLD, 'counting_threshold': THRESHOLD, **(options or {})},
    )


@METRICS.register_module()
class ShapeScore(GatheredMetric):
    """GenEval's scores of images of captioned shapes: a fraction for each task, ``overall``, and
    the others of :func:`~mmfgm.evaluation.geneval.summarize`.

    Args:
        prompts (dict): Config of the captions, that of the evaluation's dataset: metadata rows are
            found by ``idx``.
        options (dict, optional): Options of :func:`~mmfgm.evaluation.geneval.judge` other than our
            defaults, which count detections of every task from a template IoU of 0.75.

    Raises:
        UsageError: While samples come in, if their prompts are not those of ``prompts``.
    """

    def __init__(self, prompts: dict, options: dict | None = None):
        super().__init__()
        self.prompts = DATASETS.build(prompts)
        self.options = options

    @property
    def value_names(self) -> Sequence[str]:
        return (*self.prompts.tags, *SCORES)

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        if 'prompt_embeds' in data_batch.get('cond', {}):
            given, own = (
                data_batch['cond']['prompt_embeds'],
                self.prompts.__getitems__(data_batch['idx'])['cond']['prompt_embeds'],
            )
            if given.shape != own.shape or not torch.allclose(
                given.float().cpu(), own, atol=0.05
            ):  # bf16 may hold them
                raise UsageError(
                    'the samples were made for other prompts than ShapeScore judges them by; give'
                    " the evaluation's dataset and ShapeScore's prompts the same config"
                )
        super().process(data_batch, data_samples)

    def extract(self, samples: Tensor) -> Tensor:
        return to_uint8(samples)

    def compute(self, values: Tensor) -> dict[str, float]:
        rows = []
        for idx, found in enumerate(detect(values.to(torch.uint8))):
            row = self.prompts.row(idx)
            rows.append(
                dict(
                    tag=row['tag'],
                    metadata=json.dumps(row),
                    correct=verdict(row, found, self.options).correct,
                )
            )
        return summarize(rows)
