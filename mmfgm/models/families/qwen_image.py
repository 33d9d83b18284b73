# Copyright (c) mmfgm authors.
"""Qwen-Image (Wu et al., 2025): our contract over diffusers' stock transformer and pipeline."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.flow import shift_time, uniform_times
from mmfgm.registry import MODELS, TASK_UTILS

from .base import register_family
from .blocks import features
from .latents import LatentDecoder, VAEEncoder
from .networks import DiffusersNetwork, as_map, pack, unpack
from .pipelines import DiffusersFamily
from .tokens import TokenEncoder, cut_padding, drop_padding

TITLE = 'Qwen-Image'
PATCH = 2
BLOCKS = ('transformer_blocks',)
LONGEST = 1024
# positions that diffusers' rotary embedding has, half of them on either side of the centre
POSITIONS = 8192


@MODELS.register_module()
class QwenImage(DiffusersNetwork):
    """Velocity of diffusers' ``QwenImageTransformer2DModel`` on latents, which are packed into
    patches of 2 x 2 here and only here; for the arguments see
    :class:`~mmfgm.models.families.networks.DiffusersNetwork`. Its ``latent_size`` must be given.

    Raises:
        UsageError: If weights cannot be loaded, the latents do not fit the network, or it takes
            more than a time, latents and a prompt.
    """

    network_class = 'QwenImageTransformer2DModel'
    blocks = BLOCKS

    def __init__(self, latent_size: int, *args: Any, **kwargs: Any):
        super().__init__(latent_size, *args, **kwargs)
        self.feature_dim = self.transformer.inner_dim

    def _event_shape(self, latent_size: int) -> tuple[int, int, int]:
        for name in ('guidance_embeds', 'use_additional_t_cond', 'use_layer3d_rope'):
            if self.transformer.config[name]:
                raise UsageError(
                    f'expected a transformer of text to images, found one with {name}=True; name a'
                    ' pipeline such as Qwen/Qwen-Image'
                )
        if latent_size % PATCH or not 0 < latent_size <= POSITIONS:
            raise UsageError(
                f'latent_size={latent_size} must be a multiple of the patch size {PATCH}, and at'
                f' most {POSITIONS}, which the position embeddings of this network reach'
            )
        channels = self.transformer.config.in_channels // PATCH**2
        return (channels, latent_size, latent_size)

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``, packed into tokens."""
        layer: nn.Module = self.transformer.img_in
        return layer

    def dummy_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Conditions of full-length prompts, for rehearsals."""
        width = self.transformer.config.joint_attention_dim
        return dict(prompt_embeds=torch.zeros(batch_size, 512, width))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor | None = None,
        feature_layer: int | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Velocity ``(N, C, h, w)``, or the image tokens after a layer as a map ``(N, D, h / 2, w /
        2)``.

        Args:
            x_t (Tensor): Latents ``(N, C, h, w)``.
            t (Tensor): ``(N,)`` in [0, 1].
            prompt_embeds (Tensor): ``(N, L, joint_attention_dim)``.
            prompt_mask (Tensor, optional): ``(N, L)``, 1 where there is a token and 0 after the
                last one. Defaults to tokens everywhere.
            feature_layer (int | Sequence[int], optional): Return the features after this layer,
                counted from 1, or a list of those after several, instead of the velocity; later
                layers are not run.

        Raises:
            UsageError: If there is no such layer.
        """
        dtype = self.transformer.proj_out.weight.dtype
        embeds, mask = cut_padding(prompt_embeds.to(dtype), prompt_mask)
        height, width = (side // PATCH for side in x_t.shape[-2:])
        inputs = dict(
            hidden_states=pack(x_t.to(dtype)),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            # rounded as the pipeline does: the sinusoids inside are of 1000 times this
            timestep=1000 * t / 1000,
            img_shapes=[[(1, height, width)]] * len(x_t),
            return_dict=False,
        )

        if feature_layer is None:
            return unpack(self.transformer(**inputs)[0], *x_t.shape[-2:]).to(x_t.dtype)

        def to_map(output: Any) -> Tensor:
            # a block returns (text tokens, image tokens)
            return as_map(output[1], height, width).to(x_t.dtype)

        return features(self.transformer, BLOCKS, feature_layer, inputs, to_map)


@TASK_UTILS.register_module()
class QwenImageTextEncoder(TokenEncoder):
    """Qwen-Image's Qwen2.5-VL, which sees a prompt inside the pipeline's template; see
    :class:`~mmfgm.models.families.tokens.TokenEncoder`.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int): Tokens of a prompt, and of the end of the template. Defaults to 512.
        dtype (str): Of weights and embeddings. Defaults to ``'float32'``.

    Raises:
        UsageError: If the pipeline is missing or not whole, or ``max_length`` is out of range.
    """

    def __init__(self, pretrained: str, max_length: int = 512, dtype: str = 'float32'):
        super().__init__(pretrained, max_length, LONGEST, dtype)

    def embed(self, prompts: list[str]) -> list[Tensor]:
        embeds, mask = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=self.max_length
        )
        return drop_padding(embeds, mask)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        pipeline = self.pipeline
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        dropped = pipeline.prompt_template_encode_start_idx
        return [len(ids) - dropped for ids in pipeline.tokenizer(texts).input_ids]


def _statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(1, C, 1, 1)`` of the channels of latents."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


class QwenImageEncoder(VAEEncoder):
    """Of an ``AutoencoderKLQwenImage`` and single frames: the mean of its distribution, normalised
    by channel; arguments and errors as of :class:`~mmfgm.models.families.latents.VAEEncoder`."""

    vae_class = 'AutoencoderKLQwenImage'

    def __init__(self, pretrained: str):
        super().__init__(pretrained, TITLE)
        config = self.vae.config
        self.factor = 2 ** len(config.temperal_downsample)
        self.channels = config.z_dim
        self.settings = dict(
            latents_mean=list(config.latents_mean), latents_std=list(config.latents_std)
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        frames = images.to(self.vae.device).unsqueeze(2)
        latents = self.vae.encode(frames).latent_dist.mean[:, :, 0]
        mean, std = _statistics(self.vae, latents)
        return (latents - mean) / std


@TASK_UTILS.register_module()
class QwenImageDecoder(LatentDecoder):
    """Latents to images through an ``AutoencoderKLQwenImage``, of single frames; arguments as of
    :class:`~mmfgm.models.LatentDecoder`."""

    vae_class = 'AutoencoderKLQwenImage'

    def unpack(self, latents: Tensor) -> Tensor:
        mean, std = _statistics(self.vae, latents)
        return (latents * std + mean).to(self.vae.dtype).unsqueeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[:, :, 0]


@register_family
class QwenImageFamily(DiffusersFamily):
    """Qwen-Image.

    The pipeline's ``true_cfg_scale`` is ours, with ``rescale=True, patch=2`` of
    :class:`~mmfgm.flow.guidance.ClassifierFreeGuidance`.

    A one-step generator is not exported as this pipeline: the scheduler stretches its times to end
    at ``shift_terminal``, which for a single one divides 0 by 0.
    """

    name = 'qwen_image'
    title = TITLE
    network = QwenImage
    prompt_encoder = QwenImageTextEncoder
    pipelines = ('QwenImage',)
    pipeline_class = 'QwenImagePipeline'
    network_class = 'QwenImageTransformer2DModel'
    block_types = ('QwenImageTransformerBlock',)
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
        'img_mlp.net.0.proj',
        'img_mlp.net.2',
        'txt_mlp.net.0.proj',
        'txt_mlp.net.2',
    )

    guidance_options = dict(rescale=True, patch=PATCH)

    def stock_scale(self, pipeline: Any) -> float | None:
        return inspect.signature(pipeline.__call__).parameters['true_cfg_scale'].default

    def stock_options(
        self, pipeline: Any, network: nn.Module, scale: float | None, count: int
    ) -> dict[str, Any]:
        height, width = (side * pipeline.vae_scale_factor for side in network.event_shape[-2:])
        empty = [''] * count
        return dict(true_cfg_scale=scale, negative_prompt=empty, height=height, width=width)

    def stock_times(self, steps: int, network: nn.Module, pretrained: str | None) -> Tensor:
        height, width = network.event_shape[-2:]
        return self.times(steps, tokens=height * width // PATCH**2)

    def to_stock(self, x_t: Tensor) -> Tensor:
        return pack(x_t)

    def from_stock(self, latents: Tensor, like: Tensor) -> Tensor:
        return unpack(latents, *like.shape[-2:])

    def recognises(self, index: dict[str, Any]) -> bool:
        # the pipelines that begin alike take images or controls as well
        return index.get('_class_name') == self.pipeline_class

    def load(self, pretrained: str, latent_size: int = 128, **options: Any) -> QwenImage:
        """The network; its latents are those of the pipeline's 1024 pixels unless
        ``latent_size`` is given."""
        return QwenImage(latent_size, pretrained=pretrained, **options)

    def decoder(self, pretrained: str) -> dict[str, Any]:
        return dict(type='QwenImageDecoder', pretrained=pretrained)

    def latent_encoder(self, pretrained: str) -> QwenImageEncoder:
        return QwenImageEncoder(pretrained)

    def times(self, steps: int, device: str | torch.device = 'cpu', tokens: int = 4096) -> Tensor:
        """The pipeline's own time grid ``(steps + 1,)``, from 1 to 0: even times, shifted by more
        for more patches of latents (4096 for 1024 pixels), and stretched to end at 0.02 before 0.

        Raises:
            UsageError: For 1 step, which cannot begin at 1 and end at 0.02.
        """
        if steps < 2:
            raise UsageError(
                f"Qwen-Image's time grid needs at least 2 steps, found {steps}; take 2 or more"
            )
        shift = math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))
        shifted = shift_time(uniform_times(steps).double()[:-1], shift)
        stretched = 1 - (1 - shifted) * (1 - 0.02) / (1 - shifted[-1])
        return torch.cat([stretched, stretched.new_zeros(1)]).float().to(device)
