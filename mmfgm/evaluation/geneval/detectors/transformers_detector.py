# Copyright (c) mmfgm authors.
"""A Mask2Former for machines without mmcv's compiled ops; its scores do not compare with published
ones."""

import os.path as osp

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval.judging.prompts import OBJECT_NAMES
from mmfgm.registry import TASK_UTILS

from .base import Frame, Mask2FormerDetector

# ImageNet's, with which all published Mask2Formers were trained
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# of the features with the lowest resolution
STRIDE = 32


@TASK_UTILS.register_module()
class TransformersMask2Former(Mask2FormerDetector):
    """A Mask2Former of the transformers library, trained for COCO instances.

    Images are resized and detections chosen as mmdet does it; the weights are others than
    GenEval's, so the scores do not compare with published ones.

    Args:
        pretrained (str): Local folder or hub id, such as
            ``facebook/mask2former-swin-small-coco-instance``.
        score_threshold (float): See :class:`MMDetMask2Former`, also for the next three.
        prefilter (bool): Drop detections below the threshold before their masks are resized.
        batch_size (int): Images per call of the network.
        device (str, optional): Where it runs.
        size (tuple[int, int]): The shorter side gets the second, unless the longer would exceed the
            first. Defaults to ``(1333, 800)``.

    Raises:
        UsageError: If transformers is missing, or ``pretrained`` cannot be had or is of another
            architecture or of other classes.
    """

    def __init__(
        self,
        pretrained: str,
        score_threshold: float = 0.3,
        prefilter: bool = True,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        size: tuple[int, int] = (1333, 800),
    ):
        self.size = size
        name = osp.basename(osp.normpath(pretrained)) if osp.isdir(pretrained) else pretrained
        self.label = (
            f'Mask2Former (transformers, {name}), not comparable with published GenEval scores'
        )
        super().__init__(_load(pretrained), score_threshold, prefilter, batch_size, device)

    def forward(self, images: list[np.ndarray]) -> tuple[Tensor, Tensor, Frame]:
        height, width = images[0].shape[:2]
        scale = min(max(self.size) / max(height, width), min(self.size) / min(height, width))
        resized = int(height * scale + 0.5), int(width * scale + 0.5)
        batch = np.stack(
            [cv2.resize(image, resized[::-1], interpolation=cv2.INTER_LINEAR) for image in images]
        )
        pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
        # mmdet pads after normalization, and lets the network look at the padding
        pixels = F.pad((pixels - mean) / std, (0, -resized[1] % STRIDE, 0, -resized[0] % STRIDE))
        out = self.network(pixels, output_auxiliary_logits=False)
        return (
            out.class_queries_logits,
            out.masks_queries_logits,
            Frame(tuple(pixels.shape[2:]), resized, (height, width)),
        )


def _load(pretrained: str) -> torch.nn.Module:
    try:
        from transformers import AutoConfig, Mask2FormerForUniversalSegmentation
    except ImportError as e:
        raise UsageError(
            f'TransformersMask2Former needs transformers, which does not import ({e}): pip install '
            'transformers'
        ) from e
    try:
        config = AutoConfig.from_pretrained(pretrained)
        if config.model_type != 'mask2former' or config.num_labels != len(OBJECT_NAMES):
            raise UsageError(
                f"GenEval needs a Mask2Former of COCO's 80 classes, but {pretrained!r} is a"
                f' {config.model_type} of {config.num_labels}; use'
                ' facebook/mask2former-swin-small-coco-instance or a copy of it'
            )
        network, info = Mask2FormerForUniversalSegmentation.from_pretrained(
            pretrained, dtype=torch.float32, output_loading_info=True
        )
    except UsageError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
    ) as e:  # what the hub raises: no such name, gated, no network
        raise UsageError(
            f'no Mask2Former can be loaded from {pretrained!r}: {str(e)[:400]}\nName a local folder'
            ' in the format of transformers, or a hub id that can be downloaded from here, whose'
            ' licence you have accepted if it is gated (hf auth login)'
        ) from e
    lacking = sorted(info['missing_keys'])
    if lacking:
        raise UsageError(
            f'{pretrained!r} lacks {len(lacking)} tensors of a Mask2Former, such as {lacking[0]!r},'
            ' which would be random; it is of another architecture: name a checkpoint for instance'
            ' segmentation'
        )
    return network
