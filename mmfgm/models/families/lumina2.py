# Copyright (c) mmfgm authors.
"""Lumina-Image 2.0 (Qin et al., 2025): text and image in one sequence, time from noise to data.

Its pipeline renormalises guided velocities row by row of the latents, not sample by sample:
``ClassifierFreeGuidance(scale, null, rescale=(-1,))``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS, TASK_UTILS

from .base import register_family
from .blocks import features
from .folding import fold_layers
from .hub import diffusers_module, load_or_explain
from .masked import MaskedTextEncoder
from .networks import DiffusersNetwork
from .pipelines import DiffusersFamily, PipelineStep

if TYPE_CHECKING:
    from ..generators import OneStepGenerator

TITLE = 'Lumina-Image 2.0'


@MODELS.register_module()
class Lumina2(DiffusersNetwork):
    """Velocity of diffusers' ``Lumina2Transformer2DModel`` on latents, whose time runs from noise
    to data, so that its output is negated here; for the arguments and errors see
    :class:`~mmfgm.models.families.networks.DiffusersNetwork`.

    Raises:
        UsageError: Also if the latents are larger than the transformer's positions reach.
    """

    network_class = 'Lumina2Transformer2DModel'
    blocks = ('layers',)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.transformer.config
        largest = config.patch_size * min(config.axes_lens[1:])
        if self.event_shape[-1] > largest:
            raise UsageError(
                f"expected latent_size up to {largest}, which this network's positions reach, found"
                f' {self.event_shape[-1]}; choose smaller images'
            )
        self.feature_dim = config.hidden_size

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``, packed into tokens."""
        layer: nn.Module = self.transformer.x_embedder
        return layer

    def dummy_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Conditions of the shapes that a cache of prompts yields, for rehearsals."""
        channels = self.transformer.config.cap_feat_dim
        return dict(
            prompt_embeds=torch.zeros(batch_size, Lumina2TextEncoder.length, channels),
            prompt_mask=torch.ones(batch_size, Lumina2TextEncoder.length),
        )

    def timestep(self, t: Tensor) -> Tensor:
        """What the transformer takes for ``t``."""
        return 1 - t

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
            prompt_embeds (Tensor): ``(N, L, cap_feat_dim)``.
            prompt_mask (Tensor): ``(N, L)``: 1 at tokens, 0 at padding behind them.
            feature_layer (int | Sequence[int], optional): Return the features after this layer,
                counted from 1 behind the refiners, or a list of those after several, instead of the
                velocity; later layers are not run.

        Raises:
            UsageError: If there is no such layer.
        """
        mask = prompt_mask.bool()
        inputs = dict(
            hidden_states=x_t.to(self.dtype),
            timestep=self.timestep(t),
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            encoder_attention_mask=mask,
            return_dict=False,
        )
        if feature_layer is None:
            return -self.transformer(**inputs)[0].to(x_t.dtype)
        height, width = (side // self.transformer.config.patch_size for side in x_t.shape[-2:])
        # a sample's image tokens follow its prompt, without padding between them
        places = torch.arange(height * width, device=x_t.device) + mask.sum(1, keepdim=True)

        def to_map(tokens: Tensor) -> Tensor:
            image = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
            return image.transpose(1, 2).unflatten(2, (height, width)).to(x_t.dtype)

        return features(self.transformer, self.blocks, feature_layer, inputs, to_map)


@TASK_UTILS.register_module()
class Lumina2TextEncoder(MaskedTextEncoder):
    """Lumina 2's Gemma 2, with the system prompt that the pipeline puts before each prompt;
    arguments and errors as of :class:`~mmfgm.models.families.masked.MaskedTextEncoder`."""

    title = TITLE
    length = 256
    # the transformer's positions reach 300, of which the image needs one
    longest = 299

    @property
    def prefix(self) -> str:
        # as encode_prompt joins them
        return f'{self.pipeline.system_prompt} <Prompt Start> '


@register_family
class Lumina2Family(DiffusersFamily):
    """Lumina-Image 2.0."""

    name = 'lumina2'
    title = TITLE
    network = Lumina2
    prompt_encoder = Lumina2TextEncoder
    pipelines = ('Lumina2',)
    pipeline_class = 'Lumina2Pipeline'
    network_class = 'Lumina2Transformer2DModel'
    shift = 6.0
    # the pipeline's cfg_normalization
    guidance_options = dict(rescale=(-1,))
    block_types = ('Lumina2TransformerBlock',)
    adapter_targets = (
        'attn.to_q',
        'attn.to_k',
        'attn.to_v',
        'attn.to_out.0',
        'feed_forward.linear_1',
        'feed_forward.linear_2',
        'feed_forward.linear_3',
    )
    folds = True

    def stock_times(self, steps: int, network: nn.Module, pretrained: str | None) -> Tensor:
        return self.times(steps, pretrained=pretrained)

    def times(
        self, steps: int, device: str | torch.device = 'cpu', pretrained: str | None = None
    ) -> Tensor:
        """The pipeline's own time grid ``(steps + 1,)``: even times down to ``1 / steps``, which
        its scheduler shifts, then 0.

        Args:
            steps (int): At least 1.
            device (str | torch.device): Of the result.
            pretrained (str, optional): Pipeline whose scheduler shifts. Defaults to the published
                shift of 6.

        Raises:
            UsageError: If the pipeline cannot be had.
        """
        from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift

        cls = diffusers_module().FlowMatchEulerDiscreteScheduler
        config: dict[str, Any] = dict(shift=self.shift)
        mu = None
        if pretrained is not None:
            config = load_or_explain(
                lambda: cls.load_config(pretrained, subfolder='scheduler'), pretrained, self.title
            )
        scheduler = cls.from_config(config)
        if pretrained is not None and scheduler.config.use_dynamic_shifting:
            network = self.without_weights(dict(type='Lumina2', pretrained=pretrained))
            keys = ('base_image_seq_len', 'max_image_seq_len', 'base_shift', 'max_shift')
            # of the number of channels, where other pipelines have the number of tokens
            mu = calculate_shift(
                network['config']['in_channels'], *(scheduler.config[key] for key in keys)
            )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas.to(device)

    def fold(
        self,
        generator: 'OneStepGenerator',
        step: PipelineStep,
        dtype: torch.dtype,
        trained_in: torch.dtype = torch.float32,
    ) -> nn.Module:
        """See :mod:`.folding`; both velocities are negated, so the sign plays no part."""
        network = generator.network
        transformer = network.transformer
        time = transformer.time_caption_embed
        fold_layers(
            generator,
            step,
            (
                network.timestep(torch.tensor([generator.t_star])),
                network.timestep(torch.tensor([step.timestep / 1000])),
            ),
            time.time_proj,
            time.timestep_embedder.linear_1,
            transformer.x_embedder,
            transformer.norm_out.linear_2,
            dtype,
            trained_in,
        )
        return transformer.to(dtype)  # type: ignore[return-value]
