# Copyright (c) mmfgm authors.
import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]; float images pass."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Move batches to the device, bring uint8 images to [-1, 1] there, and flip them while
    training.

    Flips are drawn by the training process, one per image, so that a resumed run repeats them
    whatever the number of loader workers.

    Args:
        flip_prob (float): Probability of mirroring a training image. Defaults to 0.5.

    Raises:
        UsageError: If that is not a probability.
    """

    def __init__(self, flip_prob: float = 0.5):
        super().__init__(non_blocking=True)
        if not 0 <= flip_prob <= 1:
            raise UsageError(f'flip_prob must lie in [0, 1], but is {flip_prob}')
        self.flip_prob = flip_prob

    def forward(self, data: dict, training: bool = False) -> dict:
        data = super().forward(data, training)
        if 'x_0' in data:
            data = self._scale(data, training)
        if 'real' in data:
            data = {**data, 'real': self._scale(data['real'], training)}
        return data

    def _scale(self, data: dict, training: bool) -> dict:
        images = {name: from_uint8(data[name]) for name in ('x_0', 'eps') if name in data}
        if training and self.flip_prob:
            x_0 = images['x_0']
            flip = (torch.rand(len(x_0), device=x_0.device) < self.flip_prob)[:, None, None, None]
            # noise that belongs to its sample is mirrored with it
            images = {k: torch.where(flip, v.flip(-1), v) for k, v in images.items()}
        return {**data, **images}
