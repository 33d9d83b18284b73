# Copyright (c) mmfgm authors.
"""A one-step generator as the weights of a stock transformer, exactly.

The generator calls its network once, at one time, so what surrounds the call can move into the
weights. A pipeline's single step computes ``skip z - scale v'(z, t')``. With ``v'`` of the
generator's weights, but for

- the patch embedding's weight times ``c_in`` (its bias adds to what comes from ``c_in z``),
- the output projection's weight and bias times ``c_out / scale``,
- the first bias of the time embedding plus ``W (s(t*) - s(t'))``, ``s`` the sinusoids of what the
network is told of a time, and ``W`` that layer's weight,

this is ``c_skip z - c_out v(c_in z, t*)`` (Eq. B.1) if ``c_skip = skip``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .pipelines import PipelineStep

if TYPE_CHECKING:
    from ..generators import OneStepGenerator


@torch.no_grad()
def fold_layers(
    generator: 'OneStepGenerator',
    step: PipelineStep,
    timesteps: tuple[Tensor, Tensor],
    time_proj: Callable[[Tensor], Tensor],
    time_linear: nn.Linear,
    enter: nn.Linear | nn.Conv2d,
    leave: nn.Linear,
    dtype: torch.dtype,
    trained_in: torch.dtype,
) -> None:
    """Change three layers of a generator's transformer in place, to float64; rounding them to
    ``dtype`` is the caller's.

    Args:
        generator (OneStepGenerator): Whose network the layers are of.
        step (PipelineStep): Of the pipeline that will call the transformer.
        timesteps (tuple[Tensor, Tensor]): ``(1,)`` each: what the network tells the transformer of
            ``t*``, and what the pipeline tells it in its step.
        time_proj (Callable): Timesteps ``(1,)`` to sinusoids ``(1, F)``.
        time_linear (nn.Linear): The layer that takes them.
        enter (nn.Linear | nn.Conv2d): The layer that takes the latents, and nothing else.
        leave (nn.Linear): The last layer.
        dtype (torch.dtype): To which the pipeline rounds its sinusoids and weights.
        trained_in (torch.dtype): To which the network rounded its sinusoids in training.

    Raises:
        UsageError: If ``c_skip`` is not the pipeline's.
    """
    step.check(generator)
    ours = time_proj(timesteps[0])[0].to(trained_in).double()
    # the pipeline rounds its sinusoids, and the weight, to the new dtype
    theirs = time_proj(timesteps[1])[0].to(dtype).double()
    weight = time_linear.weight
    shift = weight.double() @ ours - weight.to(dtype).double() @ theirs
    time_linear.bias.data = time_linear.bias.double() + shift
    enter.weight.data = enter.weight.double() * generator.c_in
    for p in (leave.weight, leave.bias):
        p.data = p.double() * (generator.c_out / step.scale)
