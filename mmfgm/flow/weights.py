# Copyright (c) mmfgm authors.
"""Weights of a generator's loss: each call gives one number a sample, ``(N,)``, without gradient.

``weight(u, path)`` sees the teacher's velocity and where it was evaluated.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .path import PathSample

Weight = Callable[[Tensor, PathSample], Tensor]

# SiD divides by how far the teacher's estimate of x_0 is off, and by no less than this
SMALLEST_ERROR = 1e-5


def mean_over_event(x: Tensor) -> Tensor:
    """``(N, *event)`` to ``(N,)``."""
    return x.flatten(1).mean(1)


def velocity_error(u: Tensor, path: PathSample) -> Tensor:
    """``mean_d |u - (eps - x_0)|`` of each sample, without gradient.

    With the denoiser ``D_u = x_t - t u``, t times it is ``mean_d |x_0 - D_u(x_t)|``.
    """
    return mean_over_event((u.detach() - path.velocity.detach()).abs())


@dataclass(frozen=True)
class PowerWeight:
    """``t^a (1 - t)^b``.

    Args:
        t (float): The power a. Defaults to 0.
        one_minus_t (float): The power b. Defaults to 0.
    """

    t: float = 0.0
    one_minus_t: float = 0.0

    @property
    def order_at_0(self) -> float:
        """The weight goes like this power of t as t goes to 0; below 0 it is not defined there."""
        return self.t

    def __call__(self, u: Tensor, path: PathSample) -> Tensor:
        t = path.t.to(u.dtype)
        return t**self.t * (1 - t) ** self.one_minus_t


@dataclass(frozen=True)
class SiDWeight:
    """``t^2 / (2 mean_d |x_0 - D_u(x_t)|)``, SiD's (Zhou et al., 2024, Eq. 25) in terms of
    velocities.

    SiD writes its loss for denoisers: ``(1 - alpha) |D_u - D_v|^2 + (D_u - D_v)(D_v - x_0)``, over
    ``mean |x_0 - D_u|``; every factor of it is ``t`` times one of velocities.
    """

    order_at_0 = 1.0

    def __call__(self, u: Tensor, path: PathSample) -> Tensor:
        t = path.t.to(u.dtype)
        return t.square() / (2 * (t * velocity_error(u, path)).clamp(min=SMALLEST_ERROR))


WEIGHTS: dict[str, Weight] = dict(
    sid=SiDWeight(),
    # SiD-DiT (Zhou et al., 2025), for SD3, FLUX and SANA
    sid_dit=PowerWeight(t=2.0, one_minus_t=1.0),
)


def weight_named(weight: str | dict[str, float] | Weight | None) -> Weight:
    """A weight from its short form.

    Args:
        weight (str | dict | callable, optional): A name in ``WEIGHTS``; the powers of
            :class:`PowerWeight`, for example ``dict(t=1.)``; a callable ``(u, path) -> (N,)``; None
            is 1.

    Raises:
        ValueError: For an unknown name or other keys.
    """
    if weight is None:
        return PowerWeight()
    if callable(weight):
        return weight
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise ValueError(
                f'there is no weight {weight!r}; use one of {sorted(WEIGHTS)}, or powers such as '
                'dict(t=1.0, one_minus_t=0.0)'
            )
        return WEIGHTS[weight]
    if not set(weight) <= {'t', 'one_minus_t'}:
        raise ValueError(
            f'a weight is made of powers of t and of 1 - t, but is {dict(weight)}; write it as '
            'dict(t=1.0, one_minus_t=0.0)'
        )
    return PowerWeight(**weight)
