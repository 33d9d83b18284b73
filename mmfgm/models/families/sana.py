# Copyright (c) mmfgm authors.
"""SANA and SANA-1.5 (Xie et al., 2024 and 2025): linear attention on 32-channel latents of a
32-fold autoencoder.

Published pipelines come with DPM-Solver++, whose scheduler rounds times down to whole thousandths
before the network sees them; the ODE here is integrated at exact times, which is what the pipeline
does with diffusers' ``FlowMatchEulerDiscreteScheduler(shift=3.0)``.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS, TASK_UTILS

from .base import register_family
from .blocks import features
from .folding import fold_layers
from .latents import LatentDecoder, VAEEncoder
from .masked import MaskedTextEncoder
from .networks import DiffusersNetwork
from .pipelines import DiffusersFamily, PipelineStep

if TYPE_CHECKING:
    from ..generators import OneStepGenerator

TITLE = 'SANA'
SPRINT = (
    'SANA-Sprint is not a flow-matching teacher: it is a distilled few-step model on the'
    ' trigonometric path (TrigFlow), with guidance built in; name the SANA that it was distilled'
    ' from'
)


@MODELS.register_module()
class Sana(DiffusersNetwork):
    """Velocity of diffusers' ``SanaTransformer2DModel`` on latents; for the arguments and errors
    see :class:`~mmfgm.models.families.networks.DiffusersNetwork`.

    Raises:
        UsageError: Also if the transformer is SANA-Sprint's.
    """

    network_class = 'SanaTransformer2DModel'
    blocks = ('transformer_blocks',)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.transformer.config
        if config.guidance_embeds:
            raise UsageError(SPRINT)
        self.feature_dim = config.num_attention_heads * config.attention_head_dim

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``."""
        layer: nn.Module = self.transformer.patch_embed.proj
        return layer

    def dummy_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Conditions of the shapes that a cache of prompts yields, for rehearsals."""
        channels = self.transformer.config.caption_channels
        return dict(
            prompt_embeds=torch.zeros(batch_size, SanaTextEncoder.length, channels),
            prompt_mask=torch.ones(batch_size, SanaTextEncoder.length),
        )

    def timestep(self, t: Tensor) -> Tensor:
        """What the transformer takes for ``t``, as the pipeline scales it."""
        return 1000 * t * self.transformer.config.timestep_scale

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        feature_layer: int | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Velocity ``(N, C, h, w)``, or the image tokens after a layer as a map ``(N, D, h / p, w /
        p)``.

        Args:
            x_t (Tensor): Latents ``(N, C, h, w)``.
            t (Tensor): ``(N,)`` in [0, 1].
            prompt_embeds (Tensor): ``(N, L, caption_channels)``.
            prompt_mask (Tensor): ``(N, L)``: 1 at tokens, 0 at padding.
            feature_layer (int | Sequence[int], optional): Return the features after this layer,
                counted from 1, or a list of those after several, instead of the velocity; later
                layers are not run.

        Raises:
            UsageError: If there is no such layer.
        """
        inputs = dict(
            hidden_states=x_t.to(self.dtype),
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            timestep=self.timestep(t),
            encoder_attention_mask=prompt_mask,
            return_dict=False,
        )
        if feature_layer is None:
            # the pipeline too leaves out channels of a learned variance
            return self.transformer(**inputs)[0][:, : x_t.shape[1]].to(x_t.dtype)
        sides = [side // self.transformer.config.patch_size for side in x_t.shape[-2:]]
        return features(
            self.transformer,
            self.blocks,
            feature_layer,
            inputs,
            lambda tokens: tokens.transpose(1, 2).unflatten(2, sides).to(x_t.dtype),
        )


@TASK_UTILS.register_module()
class SanaTextEncoder(MaskedTextEncoder):
    """SANA's Gemma 2, with the instruction that the pipeline puts before each prompt; arguments and
    errors as of :class:`~mmfgm.models.families.masked.MaskedTextEncoder`."""

    title = TITLE
    length = 300
    longest = 4096

    @property
    def arguments(self) -> dict[str, Any]:
        call = inspect.signature(type(self.pipeline).__call__).parameters
        name = 'complex_human_instruction'
        return {name: call[name].default}

    @property
    def prefix(self) -> str:
        return '\n'.join(self.arguments['complex_human_instruction'])

    def limit(self) -> int:
        # as encode_prompt counts them
        return self.count_tokens([self.prefix])[0] + self.max_length - 2

    def prepare(self, prompts: Sequence[str]) -> list[str]:
        return self.pipeline._text_preprocessing(list(prompts))


class DCEncoder(VAEEncoder):
    """Of an ``AutoencoderDC``, which has no distribution: ``latent * scaling_factor``; arguments
    and errors as of :class:`~mmfgm.models.families.latents.VAEEncoder`."""

    vae_class = 'AutoencoderDC'

    def __init__(self, pretrained: str):
        super().__init__(pretrained, TITLE)
        self.factor = self.vae.spatial_compression_ratio
        self.channels = self.vae.config.latent_channels
        self.settings = dict(scaling_factor=self.vae.config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        latents = self.vae.encode(images.to(self.vae.device)).latent
        return latents * self.vae.config.scaling_factor


@TASK_UTILS.register_module()
class DCDecoder(LatentDecoder):
    """Latents to images through an ``AutoencoderDC``; arguments as of
    :class:`~mmfgm.models.LatentDecoder`."""

    vae_class = 'AutoencoderDC'


@register_family
class SanaFamily(DiffusersFamily):
    """SANA and SANA-1.5; SANA-Sprint is refused."""

    name = 'sana'
    title = TITLE
    network = Sana
    prompt_encoder = SanaTextEncoder
    pipelines = ('Sana',)
    pipeline_class = 'SanaPipeline'
    network_class = 'SanaTransformer2DModel'
    shift = 3.0
    block_types = ('SanaTransformerBlock',)
    # both attentions, and the pointwise convolutions of the feed-forward part
    adapter_targets = (
        'attn1.to_q',
        'attn1.to_k',
        'attn1.to_v',
        'attn1.to_out.0',
        'attn2.to_q',
        'attn2.to_k',
        'attn2.to_v',
        'attn2.to_out.0',
        'ff.conv_inverted',
        'ff.conv_point',
    )
    folds = True

    def stock_options(self, *args: Any) -> dict[str, Any]:
        # sizes are those of the noise
        return dict(super().stock_options(*args), use_resolution_binning=False)

    def recognises(self, index: dict[str, Any]) -> bool:
        """Whether a ``model_index.json`` is SANA's.

        Raises:
            UsageError: If it is SANA-Sprint's, with the reason.
        """
        name = str(index.get('_class_name'))
        if name.startswith('SanaSprint'):
            raise UsageError(SPRINT)
        return name == self.pipeline_class  # and not its videos, which begin with Sana too

    def decoder(self, pretrained: str) -> dict[str, Any]:
        return dict(type='DCDecoder', pretrained=pretrained)

    def latent_encoder(self, pretrained: str) -> DCEncoder:
        return DCEncoder(pretrained)

    def fold(
        self,
        generator: 'OneStepGenerator',
        step: PipelineStep,
        dtype: torch.dtype,
        trained_in: torch.dtype = torch.float32,
    ) -> nn.Module:
        """See :mod:`.folding`; the scheduler may be DPM-Solver++, whose one step is Euler's."""
        network = generator.network
        transformer = network.transformer
        time = transformer.time_embed.emb
        # the pipeline's timestep is a float64 here, so that 999 stays a whole number
        theirs = network.timestep(torch.tensor([step.timestep / 1000], dtype=torch.float64))
        fold_layers(
            generator,
            step,
            (network.timestep(torch.tensor([generator.t_star])), theirs),
            time.time_proj,
            time.timestep_embedder.linear_1,
            transformer.patch_embed.proj,
            transformer.proj_out,
            dtype,
            trained_in,
        )
        return transformer.to(dtype)  # type: ignore[return-value]
