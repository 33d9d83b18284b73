# Copyright (c) mmfgm authors.
"""Densities of the training time ``t``; each call gives float32 times of shape ``(N,)``."""

from dataclasses import dataclass

import torch
from torch import Tensor

Device = torch.device | str | None


@dataclass(frozen=True)
class Uniform:
    """``t ~ U[low, high]``.

    Raises:
        ValueError: Unless ``0 <= low <= high <= 1``.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f'Uniform needs 0 <= low <= high <= 1, but got low={self.low}, high={self.high}'
            )

    def __call__(
        self, n: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        t = torch.rand(n, device=device, generator=generator, dtype=torch.float32)
        return self.low + (self.high - self.low) * t


@dataclass(frozen=True)
class LogitNormal:
    """``t = sigmoid(mean + std n)``, ``n ~ N(0, 1)``: the paper's ``pi(mean, std)`` (Appendix B).

    A larger ``mean`` favours noise (``t`` near 1), a smaller one data.

    Raises:
        ValueError: If ``std`` is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f'LogitNormal needs std > 0, but got std={self.std}')

    def __call__(
        self, n: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        normal = torch.randn(n, device=device, generator=generator, dtype=torch.float32)
        return torch.sigmoid(self.mean + self.std * normal)
