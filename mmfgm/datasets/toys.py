# Copyright (c) mmfgm authors.
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS

from .base import TensorDataset


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """The eight dark squares of a 4x4 board on [-2, 2]^2."""
    column = torch.randint(0, 4, (n,), generator=generator)
    row = 2 * torch.randint(0, 2, (n,), generator=generator) + column % 2
    return torch.stack([column, row], dim=1) - 2 + torch.rand(n, 2, generator=generator)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Eight normals of standard deviation 0.1, evenly spaced on a circle of radius 2."""
    angle = torch.randint(0, 8, (n,), generator=generator) * (2 * math.pi / 8)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.1 * torch.randn(n, 2, generator=generator)


SHAPES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    'checkerboard': checkerboard,
    '8gaussians': eight_gaussians,
}


@DATASETS.register_module()
class Toy2D(TensorDataset):
    """Points of a 2-D distribution: items ``dict(idx, x_0, cond={})`` with ``x_0 (2,)`` float32.

    Args:
        shape (str): ``'checkerboard'`` or ``'8gaussians'``.
        size (int): Number of points. Defaults to 100,000.
        seed (int): Selects another sample. Defaults to 0.

    Raises:
        UsageError: If the shape is unknown.
    """

    def __init__(self, shape: str, size: int = 100_000, seed: int = 0):
        if shape not in SHAPES:
            raise UsageError(f'Toy2D has no shape {shape!r}; choose from {list(SHAPES)}')
        super().__init__(x_0=SHAPES[shape](size, torch.Generator().manual_seed(seed)))
