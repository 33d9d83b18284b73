# Copyright (c) mmfgm authors.
"""An exact detector for captioned shapes, GenEval's scores from what it sees, and how close to
real renderings the pictures are."""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from mmfgm.datasets import COLORS, SHAPES, coverage, render
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


class _ShapeMetric(GatheredMetric):
    """A metric of images of captioned shapes, whose captions and scenes are found by ``idx``."""

    def __init__(self, prompts: dict):
        super().__init__()
        self.prompts = DATASETS.build(prompts)

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
                    f'the samples were made for other prompts than {type(self).__name__} judges'
                    " them by; give the evaluation's dataset and the metric's prompts the same"
                    ' config'
                )
        super().process(data_batch, data_samples)

    def extract(self, samples: Tensor) -> Tensor:
        return to_uint8(samples)


@METRICS.register_module()
class ShapeScore(_ShapeMetric):
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
        super().__init__(prompts)
        self.options = options

    @property
    def value_names(self) -> Sequence[str]:
        return (*self.prompts.tags, *SCORES)

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


@METRICS.register_module()
class ShapeQuality(_ShapeMetric):
    """What :class:`ShapeScore` does not see of images of captioned shapes: noise, blur, and whether
    one caption always gives the same picture.

    A rendering blends black with one clear colour at each pixel, along edges a pixel wide, and the
    data draw places and sizes anew for each image. So

    - ``noise`` is the root mean square distance of a pixel from the nearest such blend, of 1 from
      black to a full channel: 0 for a rendering.
    - ``blur`` is the sum of ``a (1 - a)`` over pixels, of ``a`` of a colour each, divided by that
      of renderings of the same scenes as the data: 1 if edges are as sharp, more if blurred.
    - ``spread`` is the standard deviation of the places ``(x, y)`` of a caption's objects, and
      ``size_spread`` that of their sizes, over images of the same caption, divided by that of
      renderings of the same captions: 1 if images are as diverse, 0 if each caption gives one.
      Only images that show their caption count, and captions that do so twice.

    Args:
        prompts (dict): Config of the captions, that of the evaluation's dataset.

    Raises:
        UsageError: While samples come in, if their prompts are not those of ``prompts``.
    """

    value_names = ('noise', 'blur', 'spread', 'size_spread')

    def compute(self, values: Tensor) -> dict[str, float]:
        images = values.to(torch.uint8)
        rows, scenes = zip(*map(self.prompts.scene, range(len(images))))
        real = render(scenes, images.shape[-1])
        noise, edges = _blends(images)
        found = detect(images)
        correct = [i for i, row in enumerate(rows) if verdict(row, found[i]).correct]
        captions = [rows[i]['prompt'] for i in correct]
        # boxes of the renderings are rounded to pixels like those of the images
        own, others = (
            _spreads(captions, seen, images.shape[-1])
            for seen in ([found[i] for i in correct], detect(real[correct]) if correct else [])
        )
        return dict(
            noise=noise,
            blur=edges / _blends(real)[1],
            spread=own[0] / others[0] if others[0] else 0.0,
            size_spread=own[1] / others[1] if others[1] else 0.0,
        )


def _blends(images: Tensor) -> tuple[float, float]:
    """Root mean square distance of pixels from the nearest blend of black and a clear colour, and
    the sum of ``a (1 - a)`` of the shares ``a`` of these colours."""
    squares = edges = 0.0
    colors = torch.tensor(list(COLORS.values()), dtype=torch.float64) / 255
    for part in images.split(256):  # bounds memory
        x = part.double().movedim(1, -1) / 255
        share = ((x @ colors.T) / colors.square().sum(1)).clamp(0, 1)
        distance = (x[..., None, :] - share[..., None] * colors).square().sum(-1)
        nearest = distance.min(-1)
        a = share.gather(-1, nearest.indices[..., None])
        squares += float(nearest.values.sum())
        edges += float((a * (1 - a)).sum())
    return (squares / (images.numel() // 3)) ** 0.5, edges


def _spreads(
    captions: Sequence[str], found: Sequence[Detections], size: int
) -> tuple[float, float]:
    """Standard deviations of places and of sizes within captions, pooled over them, in fractions of
    the canvas of ``size`` pixels."""
    groups = defaultdict(list)
    for caption, (boxes, _) in zip(captions, found):
        for kind, rows in boxes.items():
            # objects of one kind are told apart from left to right
            seen = sorted(map(tuple, rows[rows[:, 4] >= THRESHOLD]))
            for place, (x1, y1, x2, y2, _) in enumerate(seen):
                box = ((x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1 + y2 - y1) / 4)
                groups[caption, kind, place].append(box)
    deviations = [np.array(g) - np.mean(g, axis=0) for g in groups.values() if len(g) > 1]
    if not deviations:
        return 0.0, 0.0
    freedom = sum(len(d) - 1 for d in deviations)
    x, y, r = np.sqrt(sum((d**2).sum(0) for d in deviations) / freedom) / size
    return float(np.hypot(x, y)), float(r)
