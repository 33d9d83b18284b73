# Copyright (c) mmfgm authors.
"""A one-step generator as the weights of a stock SD3 transformer; the maths is in
:mod:`..folding`."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..folding import fold_layers
from ..pipelines import PipelineStep

if TYPE_CHECKING:
    from ...generators import OneStepGenerator


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
    transformer = generator.network.transformer
    time = transformer.time_text_embed
    fold_layers(
        generator,
        step,
        (1000 * torch.tensor([generator.t_star]), torch.tensor([step.timestep])),
        time.time_proj,
        time.timestep_embedder.linear_1,
        transformer.pos_embed.proj,
        transformer.proj_out,
        dtype,
        trained_in,
    )
    return transformer.to(dtype)  # type: ignore[return-value]
