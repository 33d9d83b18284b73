# Copyright (c) mmfgm authors.
"""A one-step generator as the weights of a stock SD3 transformer, exactly.

The generator calls its network once, at one time, so what surrounds the call can move into the
weights. A pipeline's single step computes ``skip z - scale v'(z, t')``. With ``v'`` of the
generator's weights, but for

- the patch embedding's weight times ``c_in`` (its bias adds to what comes from ``c_in z``),
- the output projection's weight and bias times ``c_out / scale``,
- the first bias of the time embedding plus ``W (s(1000 t*) - s(t'))``, ``s`` the sinusoids and
``W`` that layer's weight,

this is ``c_skip z - c_out v(c_in z, t*)`` (Eq. B.1) if ``c_skip = skip``.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..pipelines import PipelineStep

if TYPE_CHECKING:
    from ...generators import OneStepGenerator


@torch.no_grad()
def fold_generator(
    generator: 'OneStepGenerator',
    step: PipelineStep,
    dtype: torch.dtype,
    trained_in: torch.dtype = torch.float32,
) -> nn.Module:
    """Fold a generator of SD3 into its transformer, in place; summed in float64 and rounded to
    ``dtype`` once.

    Args:
        generator (OneStepGenerator): Around an :class:`~mmfgm.models.SD3`.
        step (PipelineStep): Of the pipeline that will call the transformer, whose embeddings and
            sinusoids are ``dtype``.
        dtype (torch.dtype): Of the result.
        trained_in (torch.dtype): To which the network rounded its sinusoids in training.

    Returns:
        nn.Module: The ``SD3Transformer2DModel``.

    Raises:
        UsageError: If ``c_skip`` is not the pipeline's.
    """
    step.check(generator)
    transformer = generator.network.transformer
    time = transformer.time_text_embed
    first = time.timestep_embedder.linear_1
    # the pipeline rounds its sinusoids, and the weight, to the new dtype
    ours = time.time_proj(1000 * torch.tensor([generator.t_star]))[0].to(trained_in).double()
    theirs = time.time_proj(torch.tensor([step.timestep]))[0].to(dtype).double()
    shift = first.weight.double() @ ours - first.weight.to(dtype).double() @ theirs
    first.bias.data = first.bias.double() + shift
    transformer.pos_embed.proj.weight.data = (
        transformer.pos_embed.proj.weight.double() * generator.c_in
    )
    for name in ('weight', 'bias'):
        p = getattr(transformer.proj_out, name)
        p.data = p.double() * (generator.c_out / step.scale)
    return transformer.to(dtype)  # type: ignore[return-value]
