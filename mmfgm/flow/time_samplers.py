# Copyright (c) mmfgm authors.
"""Densities of the training time ``t``; each call gives float32 times of shape ``(N,)``.

``low`` and ``high`` bound the times of each; where ``low`` is 0, a loss that is not defined at
``t = 0`` cannot use it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Device = torch.device | str | None


def _check_bounds(density: Any) -> None:
    if not 0 <= density.low <= density.high <= 1:
        raise ValueError(
            f'{type(density).__name__} needs 0 <= low <= high <= 1, but got low={density.low},'
            f' high={density.high}'
        )


@dataclass(frozen=True)
class Uniform:
    """``t ~ U[low, high]``.

    Raises:
        ValueError: Unless ``0 <= low <= high <= 1``.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_bounds(self)

    def __call__(
        self, n: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        t = torch.rand(n, device=device, generator=generator, dtype=torch.float32)
        return self.low + (self.high - self.low) * t


@dataclass(frozen=True)
class LogitNormal:
    """``t = sigmoid(mean + std n)``, ``n ~ N(0, 1)``: the paper's ``pi(mean, std)`` (Appendix B).

    A larger ``mean`` favours noise (``t`` near 1), a smaller one data.

    Args:
        mean (float): Defaults to 0.
        std (float): Defaults to 1.
        low (float): With ``high``: the density is cut off outside and keeps its shape inside.
            Defaults to 0.
        high (float): Defaults to 1.

    Raises:
        ValueError: If ``std`` is not positive, or unless ``0 <= low < high <= 1``.
    """

    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f'LogitNormal needs std > 0, but got std={self.std}')
        _check_bounds(self)
        if self.low == self.high:
            raise ValueError(f'LogitNormal needs low < high, but both are {self.low}')

    def __call__(
        self, n: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        if self.low == 0 and self.high == 1:
            normal = torch.randn(n, device=device, generator=generator, dtype=torch.float32)
            return torch.sigmoid(self.mean + self.std * normal)
        bounds = torch.tensor([self.low, self.high], dtype=torch.float64, device=device)
        low, high = torch.special.ndtr((torch.logit(bounds) - self.mean) / self.std)
        uniform = torch.rand(n, device=device, generator=generator, dtype=torch.float64)
        normal = torch.special.ndtri(low + (high - low) * uniform)
        t = torch.sigmoid(self.mean + self.std * normal)
        # rounding must not lead outside, least of all to 0
        return t.clamp(self.low, self.high).float()


@dataclass(frozen=True)
class Beta:
    """``t ~ Beta(a, b)``: density ``t^(a - 1) (1 - t)^(b - 1)``; ``Beta(2.5, 1)`` favours noise.

    Raises:
        ValueError: Unless ``a`` and ``b`` are positive.
    """

    a: float = 1.0
    b: float = 1.0
    low = 0.0
    high = 1.0

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0):
            raise ValueError(f'Beta needs a > 0 and b > 0, but got a={self.a}, b={self.b}')

    def __call__(
        self, n: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        # of two gamma variables; torch.distributions takes no generator
        shape = torch.tensor([[self.a], [self.b]], dtype=torch.float64, device=device).expand(2, n)
        x, y = torch._standard_gamma(shape, generator=generator)
        t: Tensor = x / (x + y)
        return t.float()


@dataclass(frozen=True)
class EDMGrid:
    """SiD's density (Zhou et al., 2024): uniform on the part of EDM's noise grid below a fraction.

    ``sigma = (sigma_min^(1/rho) + r (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho`` with ``r ~
    U[0, fraction]``, and ``t = sigma / (1 + sigma)``. The defaults are SiD's: ``t`` up to 0.961.

    Args:
        fraction (float): In (0, 1]. Defaults to 0.8.
        sigma_min (float): Defaults to 0.002.
        sigma_max (float): Defaults to 80.
        rho (float): Defaults to 7.

    Raises:
        ValueError: If an argument is outside its range.
    """

    fraction: float = 0.8
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.fraction <= 1 and 0 < self.sigma_min < self.sigma_max and self.rho > 0):
            raise ValueError(
                'EDMGrid needs 0 < fraction <= 1, 0 < sigma_min < sigma_max and rho > 0, but got'
                f' fraction={self.fraction}, sigma_min={self.sigma_min},'
                f' sigma_max={self.sigma_max}, rho={self.rho}'
            )

    def _time(self, r: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma: Tensor = (low + r * (high - low)) ** self.rho
        return (sigma / (1 + sigma)).float()

    def _bound(self, r: float) -> float:
        # on the CPU also while a model is built on torch's meta device
        return self._time(torch.tensor(r, dtype=torch.float64, device='cpu')).item()

    @property
    def low(self) -> float:
        """The smallest time."""
        return self._bound(0.0)

    @property
    def high(self) -> float:
        """The largest time."""
        return self._bound(self.fraction)

    def __call__(
        self, n: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        r = torch.rand(n, device=device, generator=generator, dtype=torch.float64)
        return self._time(self.fraction * r)
