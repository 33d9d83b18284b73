# Copyright (c) mmfgm authors.
"""What a detector of GenEval returns, and how the raw output of a Mask2Former becomes it, as in
mmdet."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.evaluation.features import full_precision
from mmfgm.evaluation.geneval.judging.prompts import OBJECT_NAMES

# masks that are enlarged at once: four of 1024 x 1024 pixels take 16 MiB, which glibc still reuses
CHUNK = 4


class Frame(NamedTuple):
    """Sizes ``(height, width)`` in pixels that lead from the raw masks back to the image."""

    padded: tuple[int, int]  # what the network saw
    resized: tuple[int, int]  # the image in it, at the top left
    image: tuple[int, int]

    def enlarge(self, logits: Tensor) -> Tensor:
        """Mask logits ``(n, h, w)`` in the image's size, bit for bit those of mmdet.

        Masks go along the batch axis: the CPU rounds differently for three channels than for a
            hundred.
        """
        logits = F.interpolate(logits[:, None], self.padded, mode='bilinear', align_corners=False)
        logits = logits[..., : self.resized[0], : self.resized[1]]
        return F.interpolate(logits, self.image, mode='bilinear', align_corners=False)[:, 0]


class Detected:
    """What a detector found in one image.

    Attributes:
        boxes (dict[str, np.ndarray]): GenEval's class name -> float32 ``(n, 5)``, rows ``x1, y1,
            x2, y2`` in pixels and the score in [0, 1], in the order in which the detector stores
            them. Classes without any are absent.
    """

    def __init__(
        self, labels: np.ndarray, rows: np.ndarray, masks: np.ndarray, logits: Tensor, frame: Frame
    ):
        self.boxes = {}
        self._masks = {}
        for label in np.unique(labels):
            self.boxes[OBJECT_NAMES[label]] = rows[labels == label]
            self._masks[OBJECT_NAMES[label]] = masks[labels == label]
        # small, unlike the masks; on the network's device, so that enlarging them again gives the
        # same
        self._logits = logits
        self._frame = frame

    @torch.inference_mode()
    def masks(self, class_name: str, rows: Sequence[int]) -> np.ndarray:
        """Masks ``(len(rows), H, W)``, bool, of rows of ``boxes[class_name]``."""
        logits = self._logits[self._masks[class_name][np.asarray(rows, dtype=int)].tolist()]
        parts = [self._frame.enlarge(part) > 0 for part in logits.split(CHUNK) if len(part)]
        return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, *self._frame.image), bool)


def measure(logits: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Boxes and quality of masks.

    Args:
        logits (Tensor): Raw mask logits ``(n, h, w)``.
        frame (Frame): Sizes.

    Returns:
        tuple[Tensor, Tensor]: Tight boxes ``(n, 4)`` of ``x1, y1, x2, y2`` in pixels, zero for an
        empty mask, and the mean probability inside each mask, ``(n,)`` in [0, 1].
    """
    boxes = []
    quality = []
    for part in logits.split(CHUNK):
        part = frame.enlarge(part)
        inside = part > 0
        sides = []
        for covered in (inside.any(1), inside.any(2)):
            ends = torch.stack(
                [covered.int().argmax(1), covered.shape[1] - covered.flip(1).int().argmax(1)], 1
            )
            sides.append(ends * covered.any(1, keepdim=True))
        boxes.append(torch.stack(sides, 2).flatten(1).float())
        # float64: the sum must not depend on how many masks are summed beside it
        total = part.sigmoid_().mul_(inside).sum((1, 2), dtype=torch.float64).float()
        quality.append(total / (inside.sum((1, 2)).float() + 1e-6))
    return torch.cat(boxes), torch.cat(quality)


def postprocess(
    class_logits: Tensor,
    mask_logits: Tensor,
    frame: Frame,
    limit: int = 100,
    threshold: float | None = None,
) -> Detected:
    """Detections of one image, by the rules of mmdet's
    ``MaskFormerFusionHead.instance_postprocess``.

    Args:
        class_logits (Tensor): ``(Q, 81)``, the last for no object.
        mask_logits (Tensor): ``(Q, h, w)``.
        frame (Frame): Sizes.
        limit (int): (query, class) pairs of an image.
        threshold (float, optional): Leave pairs out whose score cannot exceed it, before masks are
            enlarged. A score is the class probability times the mean of probabilities inside the
            mask, which is at most 1 in float32 too (a sum of n numbers up to 1 never rounds above
            n), so what exceeds the threshold does not change.
    """
    num_classes = class_logits.shape[-1] - 1
    # the order of an unsorted top-k is that of the detections: first of all, as in mmdet
    scores, pairs = class_logits.softmax(-1)[:, :-1].flatten().topk(limit, sorted=False)
    if threshold is not None:
        possible = scores > threshold
        scores = scores[possible]
        pairs = pairs[possible]
    queries, masks = (pairs // num_classes).unique(return_inverse=True)
    logits = mask_logits[queries]
    if len(queries):
        boxes, quality = measure(logits, frame)
        rows = torch.cat([boxes[masks], (scores * quality[masks])[:, None]], 1)
    else:
        rows = scores.new_zeros(0, 5)
    labels, masks = torch.stack([pairs % num_classes, masks]).cpu().numpy()
    return Detected(labels, rows.cpu().numpy(), masks, logits, frame)


def check_images(images: Sequence[np.ndarray]) -> None:
    """Raise a UsageError unless all are ``(H, W, 3)`` uint8 arrays."""
    for image in images:
        if (
            not isinstance(image, np.ndarray)
            or image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[2] != 3
        ):
            what = (
                f'{image.dtype} {image.shape}'
                if isinstance(image, np.ndarray)
                else type(image).__name__
            )
            raise UsageError(
                f'a detector takes RGB images as uint8 arrays (H, W, 3), but got {what}; convert'
                ' them with np.asarray(image.convert("RGB"))'
            )


class Mask2FormerDetector:
    """What all Mask2Formers share: batches of equal size, and the rules of post-processing.

    A subclass sets ``label`` and implements :meth:`forward`.

    Args:
        network (nn.Module): The network.
        score_threshold (float): The lowest score that anybody will ask for.
        prefilter (bool): Do not enlarge masks that cannot reach ``score_threshold``; see
            :func:`postprocess`.
        batch_size (int): Images of equal size that go through the network together.
        device (str or torch.device, optional): Where the network starts; the CPU by default.
        limit (int): (query, class) pairs of an image.

    Attributes:
        label (str): Name for tables.
        comparable (bool): Whether the scores compare with published ones.
        device (torch.device): Where the network is.
    """

    label: str
    comparable = False

    def __init__(
        self,
        network: nn.Module,
        score_threshold: float,
        prefilter: bool,
        batch_size: int,
        device: str | torch.device | None,
        limit: int = 100,
    ):
        if batch_size < 1 or not 0 <= score_threshold < 1:
            raise UsageError(
                'a detector needs batch_size from 1 and score_threshold in [0, 1), but got'
                f' {batch_size} and {score_threshold}'
            )
        self.network = network.eval().requires_grad_(False)
        self.threshold = score_threshold if prefilter else None
        self.batch_size = batch_size
        self.limit = limit
        self.to(device or 'cpu')

    def to(self, device: str | torch.device) -> 'Mask2FormerDetector':
        """Move the network, and return self."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def forward(self, images: list[np.ndarray]) -> tuple[Tensor, Tensor, Frame]:
        """Class logits ``(N, Q, 81)`` and mask logits ``(N, Q, h, w)`` of RGB images ``(H, W, 3)``
        uint8 of one size."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Detected]:
        """Detections of RGB images, uint8 ``(H, W, 3)``, whose sizes may differ.

        Raises:
            UsageError: If an image is of another type or shape.
        """
        check_images(images)
        by_size: dict[tuple, list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(index)
        found: list[Detected | None] = [None] * len(images)
        for indices in by_size.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                with full_precision():
                    class_logits, mask_logits, frame = self.forward(
                        [images[index] for index in batch]
                    )
                for index, classes, masks in zip(batch, class_logits, mask_logits):
                    found[index] = postprocess(classes, masks, frame, self.limit, self.threshold)
        return found
