# Copyright (c) mmfgm authors.
"""What a caller hands in and gets back: seeds, whole numbers, pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.evaluation import to_uint8

# torch's CPU generator sees the lower 32 bits of a seed only
SEEDS = 2**32
OUT_TYPES = ('pil', 'numpy', 'tensor')


def is_int(value: Any) -> bool:
    """Whether a value is a whole number, numpy's too, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def as_seeds(seeds: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each of ``count`` inputs; a number is that of the first.

    Raises:
        UsageError: If there are more or fewer, or they are no seeds.
    """
    seeds = 0 if seeds is None else seeds
    if is_int(seeds):
        seeds = range(int(seeds), int(seeds) + count)
    seeds = seeds.tolist() if isinstance(seeds, (np.ndarray, Tensor)) else list(seeds)
    if len(seeds) != count:
        raise UsageError(
            f'there are {len(seeds)} seeds for {count} inputs; give one for each, or a single'
            ' number to count from'
        )
    wrong = [seed for seed in seeds if not is_int(seed) or not 0 <= seed < SEEDS]
    if wrong:
        raise UsageError(
            f'seeds are whole numbers in [0, {SEEDS - 1}], not {wrong[0]!r}; give such'
        )
    return [int(seed) for seed in seeds]


def check_images(sample: Tensor) -> None:
    """Raise a UsageError unless a sample is a picture."""
    if sample.ndim != 3 or sample.shape[0] not in (1, 3):
        raise UsageError(
            f'samples of shape {tuple(sample.shape)} are not pictures of 1 or 3 channels; ask for'
            " out='numpy' or out='tensor', and no grid"
        )


def convert(sample: Tensor, out: str) -> Any:
    """A sample ``(C, H, W)`` or point as ``'pil'``, ``'numpy'`` or ``'tensor'``."""
    if out == 'tensor':
        return sample
    if sample.ndim != 3 and out == 'numpy':
        return sample.numpy()
    check_images(sample)
    image = to_uint8(sample).permute(1, 2, 0).numpy()
    return (
        image
        if out == 'numpy'
        else Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    )


def draw_grid(samples: Sequence[Tensor], nrow: int) -> np.ndarray:
    """Pictures ``(C, H, W)`` in [-1, 1] side by side, ``nrow`` in a row: uint8 ``(H, W, 3)``."""
    check_images(samples[0])
    images = torch.stack([to_uint8(sample) for sample in samples])
    # imported late, as it takes over a second
    from torchvision.utils import make_grid

    return make_grid(images, nrow=nrow, padding=1, pad_value=255).permute(1, 2, 0).numpy()
