# Copyright (c) mmfgm authors.
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base import register_family
from ..pipelines import DiffusersFamily, PipelineStep
from .folding import fold_generator
from .network import SD3
from .prompts import TITLE, SD3TextEncoder

if TYPE_CHECKING:
    from ...generators import OneStepGenerator


@register_family
class SD3Family(DiffusersFamily):
    """Stable Diffusion 3 and 3.5 (Esser et al., 2024)."""

    name = 'sd3'
    title = TITLE
    network = SD3
    prompt_encoder = SD3TextEncoder
    pipelines = ('StableDiffusion3',)
    pipeline_class = 'StableDiffusion3Pipeline'
    network_class = 'SD3Transformer2DModel'
    shift = 3.0
    block_types = ('JointTransformerBlock',)
    # attention and feed-forward layers of both streams
    adapter_targets = (
        'attn.to_q',
        'attn.to_k',
        'attn.to_v',
        'attn.to_out.0',
        'attn.add_q_proj',
        'attn.add_k_proj',
        'attn.add_v_proj',
        'attn.to_add_out',
        'ff.net.0.proj',
        'ff.net.2',
        'ff_context.net.0.proj',
        'ff_context.net.2',
    )
    folds = True

    def load(self, pretrained: str, latent_size: int | None = None, **options: Any) -> SD3:
        """The network; its latents have the pipeline's own size unless ``latent_size`` is given."""
        if latent_size is None:
            config = dict(type='SD3', pretrained=pretrained)
            place: dict[str, Any] = {
                key: options[key] for key in ('subfolder', 'revision') if key in options
            }
            latent_size = self.without_weights({**config, **place})['config']['sample_size']
        return SD3(latent_size, pretrained=pretrained, **options)

    def fold(
        self,
        generator: 'OneStepGenerator',
        step: PipelineStep,
        dtype: torch.dtype,
        trained_in: torch.dtype = torch.float32,
    ) -> nn.Module:
        return fold_generator(generator, step, dtype, trained_in)
