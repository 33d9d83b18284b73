# Copyright (c) mmfgm authors.
"""FLUX.2 (Black Forest Labs, 2025): dev, whose guidance is an input, and klein, whose base models
are guided by two calls and whose distilled ones not at all."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mmfgm.registry import MODELS, TASK_UTILS

from .base import LatentEncoder, above, register_family
from .flux import FluxFamily, FluxNetwork, Size, both_sides, sinusoids
from .hub import diffusers_module
from .latents import LatentDecoder, VAEEncoder
from .networks import as_map
from .pipelines import DiffusersFamily, PipelineStep
from .text import LONGEST, PipelineText, check_length

if TYPE_CHECKING:
    from ..generators import OneStepGenerator


@MODELS.register_module()
class Flux2(FluxNetwork):
    """Velocity of diffusers' ``Flux2Transformer2DModel`` on latents ``(128, h, w)``, a sixteenth of
    the image's sides: 2 x 2 of the VAE's, which the pipeline's statistics are of too. For the
    arguments see :class:`~mmfgm.models.families.flux.FluxNetwork`.

    Raises:
        UsageError: As :class:`~mmfgm.models.families.flux.FluxNetwork`.
    """

    network_class = 'Flux2Transformer2DModel'
    default_guidance = 4.0

    def _event_shape(self, latent_size: Size) -> tuple[int, int, int]:
        return (self.transformer.config.in_channels, *both_sides(latent_size))

    def dummy_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Conditions of the shapes that a cache of full-length prompts yields, for
        rehearsals."""
        channels = self.transformer.config.joint_attention_dim
        return dict(prompt_embeds=torch.zeros(batch_size, LONGEST, channels))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        feature_layer: int | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Velocity ``(N, C, h, w)``, or the image tokens after a layer as a map ``(N, D, h, w)``.

        Args:
            x_t (Tensor): Latents ``(N, C, h, w)``.
            t (Tensor): ``(N,)`` in [0, 1].
            prompt_embeds (Tensor): ``(N, L, joint_attention_dim)``.
            feature_layer (int | Sequence[int], optional): Return the features after this layer,
                counted from 1, or a list of those after several, instead of the velocity; later
                layers are not run.

        Raises:
            UsageError: If there is no such layer.
        """
        height, width = x_t.shape[-2:]
        rows, columns, tokens = (
            torch.arange(n, device=x_t.device) for n in (height, width, prompt_embeds.shape[1])
        )
        zero = rows.new_zeros(1)
        return self._run(
            x_t.flatten(2).transpose(1, 2),
            t,
            (height, width),
            feature_layer,
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            # (image, row, column, place in the prompt) of each token
            txt_ids=torch.cartesian_prod(zero, zero, zero, tokens),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),
        )


@TASK_UTILS.register_module()
class Flux2TextEncoder(PipelineText):
    """Three hidden layers of Mistral 3 (dev) or Qwen3 (klein), side by side, of a conversation that
    has the prompt in it.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int): Tokens of the conversation, padding included, which the network sees too.
            Defaults to 512, as in the pipeline.
        dtype (str): Of weights and embeddings. Defaults to ``'float32'``.

    Raises:
        UsageError: If the pipeline is missing, gated or not whole, or ``max_length`` is out of
            range.
    """

    def __init__(self, pretrained: str, max_length: int = LONGEST, dtype: str = 'float32'):
        check_length(max_length)
        super().__init__(pretrained, max_length, dtype)

    @property
    def components(self) -> dict[str, Any]:  # type: ignore[override]
        tokenizer = self.pipeline.tokenizer
        # of dev's processor, which is for images too
        tokenizer = getattr(tokenizer, 'tokenizer', tokenizer)
        return dict(text_encoder=self.pipeline.text_encoder, tokenizer=tokenizer)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds (N, max_length, 3 D)`` on the encoder's device."""
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_length
        )
        return dict(prompt_embeds=embeds)

    def too_long(self, prompts: Sequence[str]) -> list[str | None]:
        return above(self.count_tokens(prompts), self.max_length, 'text tokens')

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt's conversation, before any cut."""
        # the conversations that encode_prompt makes, and cuts without a word
        template = self.pipeline.tokenizer.apply_chat_template
        if not hasattr(self.pipeline, 'system_message'):
            talks = [[dict(role='user', content=prompt)] for prompt in prompts]
            texts = template(
                talks, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            return [len(ids) for ids in self.pipeline.tokenizer(texts).input_ids]
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        talks = format_input(list(prompts), self.pipeline.system_message)
        encoded = template(talks, tokenize=True, return_dict=True, return_tensors=None)
        return [len(ids) for ids in encoded['input_ids']]


class _Statistics:
    """Mean and deviation ``(1, C, 1, 1)`` of a VAE's latents, 2 x 2 as channels."""

    def __init__(self, vae: nn.Module, like: Tensor):
        mean, variance = (
            x.view(1, -1, 1, 1).to(like) for x in (vae.bn.running_mean, vae.bn.running_var)
        )
        self.mean = mean
        self.std = torch.sqrt(variance + vae.config.batch_norm_eps)


class Flux2Latents(VAEEncoder):
    """Of an ``AutoencoderKLFlux2``: the mean of its distribution, 2 x 2 of it as channels,
    standardised by its statistics; arguments and errors as of
    :class:`~mmfgm.models.families.latents.VAEEncoder`."""

    vae_class = 'AutoencoderKLFlux2'

    def __init__(self, pretrained: str, kind: str):
        super().__init__(pretrained, kind)
        config = self.vae.config
        self.factor = 2 ** len(config.block_out_channels)
        self.channels = 4 * config.latent_channels

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        mean = self.vae.encode(images.to(self.vae.device)).latent_dist.mean
        latents = pixel_unshuffle(mean, 2)
        statistics = _Statistics(self.vae, latents)
        return (latents - statistics.mean) / statistics.std


@TASK_UTILS.register_module()
class Flux2Decoder(LatentDecoder):
    """Latents to images through an ``AutoencoderKLFlux2``, after the statistics of its latents;
    arguments as of :class:`~mmfgm.models.LatentDecoder`."""

    vae_class = 'AutoencoderKLFlux2'

    def unpack(self, latents: Tensor) -> Tensor:
        """Latents of the network ``(N, 4 C, h, w)`` to those of the VAE ``(N, C, 2 h, 2 w)``."""
        z = latents.to(self.vae.dtype)
        statistics = _Statistics(self.vae, z)
        return pixel_shuffle(z * statistics.std + statistics.mean, 2)


@register_family
class Flux2Family(FluxFamily):
    """FLUX.2 dev and klein, base and distilled.

    Its layers have no biases into which all could be folded, so guidance stays an input: the one
    step of an exported dev is the generator if the pipeline is called with the ``guidance_scale``
    that the network was trained with.
    """

    name = 'flux2'
    title = 'FLUX.2'
    network = Flux2
    prompt_encoder = Flux2TextEncoder
    pipelines = ('Flux2', 'Flux2Klein')
    # which opens either
    pipeline_class = 'DiffusionPipeline'
    network_class = 'Flux2Transformer2DModel'
    block_types = ('Flux2TransformerBlock', 'Flux2SingleTransformerBlock')
    # attention and feed-forward layers of both kinds of blocks, but the single blocks' attn.to_out:
    # that is the name of a list in the double ones, which cannot be adapted
    adapter_targets = (
        'attn.to_q',
        'attn.to_k',
        'attn.to_v',
        'attn.to_out.0',
        'attn.add_q_proj',
        'attn.add_k_proj',
        'attn.add_v_proj',
        'attn.to_add_out',
        'ff.linear_in',
        'ff.linear_out',
        'ff_context.linear_in',
        'ff_context.linear_out',
        'attn.to_qkv_mlp_proj',
    )
    latent_size = 64
    factor = 16
    latents_per_token = 1

    def recognises(self, index: dict[str, Any]) -> bool:
        # others inpaint, or keep keys and values of images to edit
        return index.get('_class_name') in ('Flux2Pipeline', 'Flux2KleinPipeline')

    def mu(self, tokens: int, steps: int, config: Any) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def decoder(self, pretrained: str) -> dict[str, Any]:
        return dict(type='Flux2Decoder', pretrained=pretrained)

    def latent_encoder(self, pretrained: str) -> LatentEncoder:
        return Flux2Latents(pretrained, self.title)

    def stock_scale(self, pipeline: Any) -> float | None:
        # of klein's base models
        if pipeline.config.get('is_distilled') is not False:
            return None
        return DiffusersFamily.stock_scale(self, pipeline)

    def to_stock(self, x_t: Tensor) -> Tensor:
        return x_t

    def from_stock(self, latents: Tensor, like: Tensor) -> Tensor:
        return as_map(latents, *like.shape[-2:])

    # export
    @torch.no_grad()
    def fold(
        self,
        generator: 'OneStepGenerator',
        step: PipelineStep,
        dtype: torch.dtype,
        trained_in: torch.dtype = torch.float32,
    ) -> nn.Module:
        """``c_in`` goes into the embedding of the tokens, ``c_out`` into the output.

        With ``s'`` the sinusoids of the pipeline's time, and ``s`` those of ``t*``, the first
        weight of the time embedding becomes ``W + W (s - s') s'^T / |s'|^2``, which maps ``s'`` to
        ``W s``.
        """
        step.check(generator)
        transformer: Any = generator.network.transformer
        embed = transformer.time_guidance_embed
        ours = sinusoids(embed.time_proj, generator.t_star, trained_in)
        theirs = sinusoids(embed.time_proj, step.timestep / 1000, dtype)
        first = embed.timestep_embedder.linear_1
        weight = first.weight.double()
        first.weight.data = weight + torch.outer(
            weight @ (ours - theirs), theirs / theirs.dot(theirs)
        )
        transformer.x_embedder.weight.data = transformer.x_embedder.weight.double() * generator.c_in
        transformer.proj_out.weight.data = transformer.proj_out.weight.double() * (
            generator.c_out / step.scale
        )
        return transformer.to(dtype)

    def save_adapters(self, tensors: dict[str, Tensor], folder: str, name: str) -> None:
        diffusers_module().Flux2Pipeline.save_lora_weights(
            folder, weight_name=name, transformer_lora_layers=tensors
        )

    def exported(self, network: nn.Module) -> dict[str, Any]:
        return dict(super().exported(network), guidance=network.guidance)
