# Copyright (c) mmfgm authors.
"""Solvers of the flow ODE ``dx/dt = v(x, t)`` from noise to data, as free functions.

``velocity(x, t)`` takes ``x (N, *event)`` and ``t (N,)``. ``times`` is a decreasing 1-D tensor,
usually from 1 (noise) to 0 (data).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .time_samplers import Device

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
Times = TypeVar('Times', float, Tensor)


class CountNFE:
    """Wrap a velocity and count its evaluations in ``nfe``.

    A batched call counts once, whatever its batch size; classifier-free guidance in one batched
    call also counts once, as in the tables of the field.
    """

    def __init__(self, velocity: Velocity):
        self.velocity = velocity
        self.nfe = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += 1
        return self.velocity(x, t)


def uniform_times(steps: int, device: Device = None) -> Tensor:
    """``steps + 1`` float32 times, evenly spaced from 1 (noise) to 0 (data)."""
    if steps < 1:
        raise ValueError(f'an ODE solver needs at least 1 step, but got {steps}')
    return torch.linspace(1, 0, steps + 1, device=device)


def shift_time(t: Times, shift: float) -> Times:
    """``shift t / (1 + (shift - 1) t)``, by which schedules spend more of their steps on noise
    (Esser et al., 2024, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def shifted_times(steps: int, shift: float, device: Device = None) -> Tensor:
    """The ``steps + 1`` float32 times of diffusers'
    ``FlowMatchEulerDiscreteScheduler(shift=shift)``.

    :func:`shift_time` of an even grid, whose low end, 1/1000, the scheduler has shifted once
    already; then 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(
            f'needs at least 1 step and a positive shift, but got steps={steps}, shift={shift}'
        )

    times = shift_time(
        torch.linspace(1, shift_time(1 / 1000, shift), steps, dtype=torch.float64), shift
    )
    return torch.cat([times, times.new_zeros(1)]).float().to(device)


def flux_times(steps: int, shift: float, device: Device = None) -> Tensor:
    """The ``steps + 1`` float32 times of FLUX's pipeline and of those after it, which hand the even
    grid ``1, 1 - 1 / steps, ..., 0`` to the scheduler and let it shift that.

    Where the scheduler shifts by the number of tokens (``use_dynamic_shifting``), ``shift`` is
    ``exp(mu)``.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(
            f'needs at least 1 step and a positive shift, but got steps={steps}, shift={shift}'
        )
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_time(even, shift).float().to(device)


def edm_times(
    steps: int,
    device: Device = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """The ``steps + 1`` float32 times of EDM's sampler (Karras et al., 2022, Eq. 5): ``t = sigma /
    (1 + sigma)``.

    It starts at 1 instead of 0.988, sigma_max, since our noise has no data in it. Euler's method
    takes the same steps in both parameterisations: between times, data and noise are held
    constant in either.
    """
    if steps < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f'needs at least 1 step and 0 < sigma_min < sigma_max, but got steps={steps},'
            f' sigma_min={sigma_min}, sigma_max={sigma_max}'
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = (high + ramp * (low - high)) ** rho
    times = torch.cat([sigma / (1 + sigma), sigma.new_zeros(1)])
    times[0] = 1
    return times.float().to(device)


def _check_times(times: Tensor) -> None:
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f'times must be a 1-D tensor of at least 2 values, but has shape {tuple(times.shape)}'
        )


def euler(
    velocity: Velocity, x_1: Tensor, times: Tensor, callback: Callback | None = None
) -> Tensor:
    """Euler's method: first order, one evaluation a step (NFE = ``len(times) - 1``).

    Args:
        velocity: ``(x, t) -> dx/dt``.
        x_1 (Tensor): Start, at ``times[0]``; shape ``(N, *event)``.
        times (Tensor): The time grid, shape ``(steps + 1,)``.
        callback: Called as ``callback(step, x, times[step + 1])`` after each step.

    Returns:
        Tensor: The solution at ``times[-1]``, shaped like ``x_1``.
    """
    _check_times(times)
    x = x_1
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t.expand(len(x)))
        if callback is not None:
            callback(i, x, t_next)
    return x


def heun(
    velocity: Velocity, x_1: Tensor, times: Tensor, callback: Callback | None = None
) -> Tensor:
    """Heun's method: second order, two evaluations a step (NFE = ``2 (len(times) - 1)``).

    Takes and returns what :func:`euler` does.
    """
    _check_times(times)
    x = x_1
    for i, (t, t_next) in enumerate(pairwise(times)):
        dt = t_next - t
        d = velocity(x, t.expand(len(x)))
        d_next = velocity(x + dt * d, t_next.expand(len(x)))
        x = x + dt * (d + d_next) / 2
        if callback is not None:
            callback(i, x, t_next)
    return x


euler.evaluations_per_step = 1  # type: ignore[attr-defined]
heun.evaluations_per_step = 2  # type: ignore[attr-defined]
