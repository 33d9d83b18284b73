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

from typing import Any, NamedTuple

import torch
from torch import nn

from mmfgm.errors import UsageError
from mmfgm.models import OneStepGenerator


class PipelineStep(NamedTuple):
    """What a pipeline computes with ``num_inference_steps=1``: ``skip z - scale v(z,
    timestep)``."""

    timestep: float
    skip: float
    scale: float

    @classmethod
    def of(cls, scheduler: Any) -> 'PipelineStep':
        """Ask a scheduler of diffusers.

        Raises:
            UsageError: If it is not the one of SD3.
        """
        if type(scheduler).__name__ != 'FlowMatchEulerDiscreteScheduler':
            raise UsageError(
                f'the base pipeline has a {type(scheduler).__name__}, expected is its '
                'FlowMatchEulerDiscreteScheduler; name a base as it was published'
            )

        def step(z, v):
            # mu moves the inner times of a schedule only, and one step has none
            scheduler.set_timesteps(
                1, **(dict(mu=1.0) if scheduler.config.use_dynamic_shifting else {})
            )
            return float(
                scheduler.step(
                    torch.tensor([v]), scheduler.timesteps[0], torch.tensor([z])
                ).prev_sample
            )

        skip, scale = step(1.0, 0.0), -step(0.0, 1.0)
        return cls(float(scheduler.timesteps[0]), skip, scale)

    def check(self, generator: OneStepGenerator) -> None:
        """Raise a UsageError if no change of weights turns the step into the generator."""
        if generator.c_skip != self.skip:
            raise UsageError(
                f'the generator has c_skip={generator.c_skip}, but the one step of the stock'
                f' pipeline keeps {self.skip} of the noise, which no change of weights turns into'
                f' the other; train with model.generator.c_skip={self.skip}, or sample this one'
                ' with FGMInferencer'
            )

    def is_generator(self, generator: OneStepGenerator) -> bool:
        """Whether the step is the generator's own, with nothing to fold."""
        return (self.timestep, self.skip, self.scale, 1.0) == (
            1000 * generator.t_star,
            generator.c_skip,
            generator.c_out,
            generator.c_in,
        )


@torch.no_grad()
def fold_generator(
    generator: OneStepGenerator,
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
    return transformer.to(dtype)
