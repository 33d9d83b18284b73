# Copyright (c) mmfgm authors.
"""The linear (rectified-flow) probability path, Eq. 3.5 and 3.6 of the FGM paper.

Time runs from data to noise: ``t = 0`` is data, ``t = 1`` is noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def expand_t(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times ``(N,)`` to ``(N, 1, ...)`` so that they broadcast over events.

    Args:
        t (Tensor): Times in [0, 1], shape ``(N,)``.
        x (Tensor): The tensor to broadcast over, shape ``(N, *event)``.

    Raises:
        ValueError: If ``t`` is not one time per sample.
    """
    if t.shape != x.shape[:1]:
        raise ValueError(
            f'expected one time per sample, shape ({len(x)},), but t has shape '
            f'{tuple(t.shape)}; expand a scalar time with t.expand(len(x))'
        )
    return t.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class PathSample:
    """A point on the path and everything that produced it; all ``(N, *event)`` but ``t``.

    ``velocity`` is the conditional velocity ``u_t(x_t | x_0) = eps - x_0``.
    """

    x_0: Tensor
    eps: Tensor
    t: Tensor
    x_t: Tensor
    velocity: Tensor


class LinearPath:
    """``x_t = (1 - t) x_0 + t eps`` with velocity ``dx_t/dt = eps - x_0`` (Eq. 3.5, 3.6)."""

    @staticmethod
    def interpolate(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t``, shape ``(N, *event)``, for times ``t (N,)`` in [0, 1]."""
        t = expand_t(t, x_0)
        return (1 - t) * x_0 + t * eps

    @staticmethod
    def velocity(x_0: Tensor, eps: Tensor) -> Tensor:
        """The conditional velocity ``eps - x_0``; it does not depend on ``t``."""
        return eps - x_0

    @staticmethod
    def x_0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """``x_0 = x_t - t v``."""
        return x_t - expand_t(t, x_t) * v

    @staticmethod
    def eps_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """``eps = x_t + (1 - t) v``."""
        return x_t + (1 - expand_t(t, x_t)) * v

    @staticmethod
    def velocity_from_x_0(x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """``v = (x_t - x_0) / t`` (Eq. 3.5); ``t = 0`` has no answer and gives inf or nan."""
        return (x_t - x_0) / expand_t(t, x_t)

    @classmethod
    def sample(cls, x_0: Tensor, t: Tensor, eps: Tensor | None = None) -> PathSample:
        """Draw ``x_t ~ q_t(. | x_0)``; ``eps`` is standard normal unless it is given."""
        if eps is None:
            eps = torch.randn_like(x_0)
        return PathSample(x_0, eps, t, cls.interpolate(x_0, eps, t), cls.velocity(x_0, eps))
