# Copyright (c) mmfgm authors.
"""FLUX.1 (Black Forest Labs, 2024): dev, whose guidance is an input, and schnell, which has none.

What it shares with FLUX.2 is in :class:`FluxNetwork`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from mmfgm.errors import UsageError
from mmfgm.flow import flux_times
from mmfgm.registry import MODELS, TASK_UTILS

from .base import above, register_family
from .blocks import features
from .folding import fold_layers
from .hub import diffusers_module, load_or_explain
from .networks import DiffusersNetwork, as_map, pack, unpack
from .pipelines import DiffusersFamily, PipelineStep
from .text import LONGEST, PipelineText, check_length

if TYPE_CHECKING:
    from ..generators import OneStepGenerator

Size = int | Sequence[int]
# of diffusers' pipeline, for networks that take guidance as an input
GUIDANCE = 3.5
# the double ones, then the single ones
BLOCKS = ('transformer_blocks', 'single_transformer_blocks')


def both_sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def rounded(value: float, dtype: torch.dtype) -> Tensor:
    """What a transformer of this dtype takes the sinusoids of, for a time or guidance."""
    return torch.tensor([value]).to(dtype) * 1000


def sinusoids(time_proj: nn.Module, value: float, dtype: torch.dtype) -> Tensor:
    """Of a time or guidance, in float64, rounded as a transformer of this dtype rounds the value
    and then its sinusoids."""
    return time_proj(rounded(value, dtype))[0].to(dtype).double()


class FluxNetwork(DiffusersNetwork):
    """What the networks of FLUX.1 and FLUX.2 have in common: a stock transformer of double blocks,
    then single blocks, that takes ``t`` in [0, 1] as it is and guidance, if at all, as an input. In
    bfloat16 the transformer rounds ``t`` too, to 1 / 256 near 1, as in its pipeline.

    Args:
        latent_size (int | Sequence[int]): Height and width of the latents, one number if they are
            the same.
        pretrained (str, optional): Hub id or local folder of a pipeline in diffusers' format.
        config (dict, optional): Arguments of the transformer's class for a random initialisation;
            exactly one of ``pretrained`` and ``config``.
        guidance (float, optional): The input of a network that has it, for every sample. Defaults
            to the pipeline's own.
        *args (Any): Further ones of :class:`~mmfgm.models.families.networks.DiffusersNetwork`.
        **kwargs (Any): Likewise.

    Raises:
        UsageError: If weights cannot be loaded, guidance is asked of a network without that input,
            or the network is not for making images of text.
    """

    blocks = BLOCKS
    default_guidance: float

    def __init__(
        self,
        latent_size: Size,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        guidance: float | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(latent_size, pretrained, config, *args, **kwargs)
        settings = self.transformer.config
        if self.transformer.out_channels != settings.in_channels:
            raise UsageError(
                f'expected a transformer whose velocity has the {settings.in_channels} channels of'
                f' its input, found {self.transformer.out_channels}: it edits or fills images; name'
                ' a pipeline that makes images of text'
            )
        if guidance is not None and not settings.guidance_embeds:
            raise UsageError(
                f'expected no guidance for a network that does not take it as an input, found'
                f' guidance={guidance}; leave it out (distilled models such as schnell have none,'
                ' others are guided by model.guidance)'
            )
        self.guidance = guidance
        if guidance is None and settings.guidance_embeds:
            self.guidance = self.default_guidance
        self.feature_dim = self.transformer.inner_dim

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``, packed into tokens."""
        layer: nn.Module = self.transformer.x_embedder
        return layer

    def _run(
        self,
        tokens: Tensor,
        t: Tensor,
        size: tuple[int, int],
        feature_layer: int | Sequence[int] | None,
        **inputs: Tensor,
    ) -> Tensor | list[Tensor]:
        """The transformer's output for tokens ``(N, h w, C)`` as a map ``(N, C, h, w)``, or the
        image tokens after some layers as maps; later layers are not run."""
        height, width = size
        arguments = dict(
            inputs,
            hidden_states=tokens.to(self.dtype),
            timestep=t,
            guidance=None if self.guidance is None else torch.full_like(t, self.guidance),
            return_dict=False,
        )

        def to_map(output: Any) -> Tensor:
            # a block returns (text tokens, image tokens), or one after the other
            image = output[1] if isinstance(output, tuple) else output[:, -height * width :]
            return as_map(image, height, width).to(tokens.dtype)

        if feature_layer is None:
            return as_map(self.transformer(**arguments)[0], height, width).to(tokens.dtype)
        return features(self.transformer, BLOCKS, feature_layer, arguments, to_map)

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights."""
        return self.transformer.proj_out.weight.dtype


@MODELS.register_module()
class Flux(FluxNetwork):
    """Velocity of diffusers' ``FluxTransformer2DModel`` on latents ``(16, h, w)``; it sees 2 x 2 of
    them as one token, which is done here and only here. For the arguments see :class:`FluxNetwork`.

    Raises:
        UsageError: If a side of the latents is odd, and as :class:`FluxNetwork`.
    """

    network_class = 'FluxTransformer2DModel'
    default_guidance = GUIDANCE

    def _event_shape(self, latent_size: Size) -> tuple[int, int, int]:
        height, width = both_sides(latent_size)
        if height % 2 or width % 2:
            raise UsageError(
                f'expected latents of even sides, which make tokens of 2 x 2, found {height} x'
                f' {width}; set latent_size to an eighth of images whose sides are multiples of 16'
            )
        return (self.transformer.config.in_channels // 4, height, width)

    def dummy_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Conditions of the shapes that a cache of full-length prompts yields, for
        rehearsals."""
        config = self.transformer.config
        return dict(
            prompt_embeds=torch.zeros(batch_size, LONGEST, config.joint_attention_dim),
            pooled_embeds=torch.zeros(batch_size, config.pooled_projection_dim),
        )

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        pooled_embeds: Tensor,
        feature_layer: int | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Velocity ``(N, C, h, w)``, or the image tokens after a layer as a map ``(N, D, h / 2, w /
        2)``.

        Args:
            x_t (Tensor): Latents ``(N, C, h, w)``.
            t (Tensor): ``(N,)`` in [0, 1].
            prompt_embeds (Tensor): ``(N, L, joint_attention_dim)``.
            pooled_embeds (Tensor): ``(N, pooled_projection_dim)``.
            feature_layer (int | Sequence[int], optional): Return the features after this layer,
                counted from 1, or a list of those after several, instead of the velocity; later
                layers are not run.

        Raises:
            UsageError: If there is no such layer.
        """
        height, width = (side // 2 for side in x_t.shape[-2:])
        rows = torch.arange(height, device=x_t.device)
        columns = torch.arange(width, device=x_t.device)
        made = self._run(
            pack(x_t),
            t,
            (height, width),
            feature_layer,
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            pooled_projections=pooled_embeds.to(self.dtype),
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=x_t.device),
            # (0, row, column) of each token
            img_ids=torch.cartesian_prod(rows.new_zeros(1), rows, columns),
        )
        return pixel_shuffle(made, 2) if feature_layer is None else made


@TASK_UTILS.register_module()
class FluxTextEncoder(PipelineText):
    """T5 for the tokens and CLIP for the pooled embedding, which sees the first 77 of its own.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int): T5 tokens of a prompt, padding included, which the network sees too.
            Defaults to 512, as in the pipeline; Black Forest Labs sample schnell with 256.
        dtype (str): Of weights and embeddings. Defaults to ``'float32'``.

    Raises:
        UsageError: If the pipeline is missing, gated or not whole, or ``max_length`` is out of
            range.
    """

    parts = ('text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2')

    def __init__(self, pretrained: str, max_length: int = LONGEST, dtype: str = 'float32'):
        check_length(max_length)
        super().__init__(pretrained, max_length, dtype)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds (N, max_length, D)`` and ``pooled_embeds (N, P)``, on the encoders'
        device."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_length
        )
        return dict(prompt_embeds=embeds, pooled_embeds=pooled)

    def too_long(self, prompts: Sequence[str]) -> list[str | None]:
        encoded = self.pipeline.tokenizer_2(list(prompts), padding=False, truncation=False)
        return above([len(ids) for ids in encoded.input_ids], self.max_length, 'T5 tokens')


@register_family
class FluxFamily(DiffusersFamily):
    """FLUX.1 dev and schnell, and those of the same pipeline."""

    name = 'flux'
    title = 'FLUX.1'
    network: Any = Flux
    prompt_encoder: Any = FluxTextEncoder
    pipelines: tuple[str, ...] = ('Flux',)
    pipeline_class = 'FluxPipeline'
    network_class = 'FluxTransformer2DModel'
    block_types: tuple[str, ...] = ('FluxTransformerBlock', 'FluxSingleTransformerBlock')
    # attention and feed-forward layers of both kinds of blocks; the last two are the single
    # blocks', though the network's own output has the name of the last too
    adapter_targets: tuple[str, ...] = (
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
        'proj_mlp',
        'proj_out',
    )
    folds = True

    def recognises(self, index: dict[str, Any]) -> bool:
        # others of FLUX.1 edit, fill or control images
        return index.get('_class_name') == self.pipeline_class

    # of 1024 px, which the pipeline makes unless told otherwise; pixels of a latent's side in every
    # published model; latents of a token
    latent_size = 128
    factor = 8
    latents_per_token = 4

    def load(self, pretrained: str, latent_size: Size | None = None, **options: Any) -> nn.Module:
        """The network; its latents have the pipeline's own size unless ``latent_size`` is given."""
        return self.network(latent_size or self.latent_size, pretrained=pretrained, **options)

    def shift_at(
        self, latent_size: Size | None = None, pretrained: str | None = None, steps: int = 28
    ) -> float:
        """How a pipeline shifts its times: ``exp(mu)``, where ``mu`` grows with the number of
        tokens, or what its scheduler says for all sizes (schnell: 1).

        Args:
            latent_size (int | Sequence[int], optional): As of the network. Defaults to that of 1024
                px.
            pretrained (str, optional): The pipeline. Defaults to dev as it was published.
            steps (int): Of the grid, on which the shift of FLUX.2 depends. Defaults to 28.
        """
        cls = diffusers_module().FlowMatchEulerDiscreteScheduler
        scheduler = (
            cls(use_dynamic_shifting=True)
            if pretrained is None
            else load_or_explain(
                lambda: cls.from_pretrained(pretrained, subfolder='scheduler'),
                pretrained,
                self.title,
            )
        )
        if not scheduler.config.use_dynamic_shifting:
            return scheduler.config.shift
        tokens = math.prod(both_sides(latent_size or self.latent_size)) // self.latents_per_token
        return math.exp(self.mu(tokens, steps, scheduler.config))

    def mu(self, tokens: int, steps: int, config: Any) -> float:
        """Of a scheduler's ``config``, as the pipeline computes it."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        return calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)

    def times(
        self,
        steps: int,
        device: str | torch.device = 'cpu',
        latent_size: Size | None = None,
        pretrained: str | None = None,
    ) -> Tensor:
        """The pipeline's own time grid ``(steps + 1,)``, from 1 to 0; see :meth:`shift_at`."""
        return flux_times(steps, self.shift_at(latent_size, pretrained, steps), device)

    def stock_scale(self, pipeline: Any) -> float | None:
        # guidance, if any, is an input of the network
        return None

    def stock_options(
        self, pipeline: Any, network: nn.Module, scale: float | None, count: int
    ) -> dict[str, Any]:
        height, width = (
            side * pipeline.vae_scale_factor * self.factor // 8 for side in network.event_shape[-2:]
        )
        given = network.guidance if scale is None else scale
        return dict(guidance_scale=given or 0.0, height=height, width=width)

    def stock_times(self, steps: int, network: nn.Module, pretrained: str | None) -> Tensor:
        return self.times(steps, latent_size=network.event_shape[-2:], pretrained=pretrained)

    def to_stock(self, x_t: Tensor) -> Tensor:
        return pack(x_t)

    def from_stock(self, latents: Tensor, like: Tensor) -> Tensor:
        return unpack(latents, *like.shape[-2:])

    # export
    @torch.no_grad()
    def fold(
        self,
        generator: 'OneStepGenerator',
        step: PipelineStep,
        dtype: torch.dtype,
        trained_in: torch.dtype = torch.float32,
    ) -> nn.Module:
        """See :mod:`.folding`.

        The guidance that the network was trained with goes into the bias of its embedding and
        replaces the input, so that the pipeline's ``guidance_scale`` changes nothing.
        """
        network = generator.network
        transformer: Any = network.transformer
        embed = transformer.time_text_embed
        fold_layers(
            generator,
            step,
            (rounded(generator.t_star, trained_in), rounded(step.timestep / 1000, dtype)),
            embed.time_proj,
            embed.timestep_embedder.linear_1,
            transformer.x_embedder,
            transformer.proj_out,
            dtype,
            trained_in,
        )
        if network.guidance is not None:
            first = embed.guidance_embedder.linear_1
            ours = first.weight.double() @ sinusoids(embed.time_proj, network.guidance, trained_in)
            first.bias.data = first.bias.double() + ours
            first.weight.data = torch.zeros_like(first.weight)
        return transformer.to(dtype)

    def exported(self, network: nn.Module) -> dict[str, Any]:
        return dict(type=type(network).__name__, latent_size=list(network.event_shape[-2:]))

    def call_options(self, network: nn.Module) -> dict[str, Any]:
        height, width = (self.factor * side for side in network.event_shape[-2:])
        options = dict(super().call_options(network), height=height, width=width)
        # adapters alone do not hold the guidance that they were trained with
        return (
            options if network.guidance is None else dict(options, guidance_scale=network.guidance)
        )
