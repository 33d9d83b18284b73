# Copyright (c) mmfgm authors.
"""Sliced Wasserstein-2 distance of two point clouds, in float64 (Bonneel et al., 2015)."""

import math

import torch
from torch import Tensor


def directions(dim: int, num: int, seed: int = 0) -> Tensor:
    """``num`` unit vectors ``(num, dim)``: evenly spaced angles in the plane, seeded random
    otherwise."""
    if dim == 2:
        angles = math.pi * (torch.arange(num, dtype=torch.float64) + 0.5) / num
        return torch.stack([angles.cos(), angles.sin()], dim=1)
    normal = torch.randn(
        num, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return normal / normal.norm(dim=1, keepdim=True)


def _quantiles(ordered: Tensor, levels: Tensor) -> Tensor:
    """Empirical quantile function of columns sorted along dim 0, at levels in (0, 1)."""
    n = len(ordered)
    return ordered[(levels * n).long().clamp_max(n - 1)]


def sliced_wasserstein(x: Tensor, y: Tensor, num_projections: int = 128) -> float:
    """``(mean over directions of W_2^2 of the projections)^(1/2)``, exact along each direction.

    Args:
        x (Tensor): Points ``(N, d)``.
        y (Tensor): Points ``(M, d)``; ``N`` and ``M`` may differ.
        num_projections (int): Number of directions. Defaults to 128.

    Raises:
        ValueError: If the dimensions differ or a cloud is empty.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(
            f'expected two non-empty point clouds of one dimension, but got {tuple(x.shape)} and '
            f'{tuple(y.shape)}'
        )
    theta = directions(x.shape[1], num_projections).T
    px = (x.to('cpu', torch.float64) @ theta).sort(0).values
    py = (y.to('cpu', torch.float64) @ theta).sort(0).values
    if len(px) == len(py):
        return float((px - py).square().mean().sqrt())
    # the two quantile functions are step functions: integrate between all their steps
    n = len(px)
    m = len(py)
    steps = torch.cat(
        [torch.arange(n + 1) * m, torch.arange(m + 1) * n]
    ).unique()  # in units of 1 / (n m)
    middles = (steps[1:] + steps[:-1]).double() / (2 * n * m)
    widths = steps.diff().double() / (n * m)
    squares = (_quantiles(px, middles) - _quantiles(py, middles)).square().mean(1)
    return float((widths * squares).sum().sqrt())
