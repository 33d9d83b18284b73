# Copyright (c) mmfgm authors.
"""Stable Diffusion 3 and 3.5 as a velocity network: our contract over diffusers' stock MM-DiT."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS

from ..networks import DiffusersNetwork


@MODELS.register_module()
class SD3(DiffusersNetwork):
    """Velocity of diffusers' ``SD3Transformer2DModel`` on latents; ``t`` is scaled to 0..1000 here
    and only here. For the arguments and errors see
    :class:`~mmfgm.models.families.networks.DiffusersNetwork`. Its ``latent_size``, an eighth of the
    images' sides, must be given.
    """

    network_class = 'SD3Transformer2DModel'
    blocks = ('transformer_blocks',)

    def __init__(self, latent_size: int, *args: Any, **kwargs: Any):
        super().__init__(latent_size, *args, **kwargs)
        self.feature_dim = self.transformer.inner_dim

    def _event_shape(self, latent_size: int) -> tuple[int, int, int]:
        patch = self.transformer.config.patch_size
        largest = self.transformer.config.pos_embed_max_size
        if latent_size % patch or latent_size // patch > largest:
            raise UsageError(
                f'latent_size={latent_size} must be a multiple of the patch size {patch}, and at'
                f' most {patch * largest}, which the position embeddings of this network reach'
            )
        return (self.transformer.config.in_channels, latent_size, latent_size)

    def dummy_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Conditions of the shapes that a cache of full-length prompts yields, for
        rehearsals."""
        config = self.transformer.config
        return dict(
            prompt_embeds=torch.zeros(batch_size, 333, config.joint_attention_dim),
            pooled_embeds=torch.zeros(batch_size, config.pooled_projection_dim),
        )

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``."""
        return self.transformer.pos_embed.proj

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        pooled_embeds: Tensor,
        feature_layer: int | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Velocity ``(N, C, h, w)``, or the image tokens after a layer as a map ``(N, D, h / p, w /
        p)``.

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
        dtype = self.transformer.proj_out.weight.dtype
        inputs = dict(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            pooled_projections=pooled_embeds.to(dtype),
            timestep=1000 * t,
            return_dict=False,
        )
        if feature_layer is None:
            return self.transformer(**inputs)[0].to(x_t.dtype)
        if isinstance(feature_layer, int):
            return self._features(inputs, [feature_layer], x_t)[0]
        return self._features(inputs, feature_layer, x_t)

    def _features(self, inputs: dict[str, Any], layers: Sequence[int], x_t: Tensor) -> list[Tensor]:
        for layer in layers:
            self.check_feature_layer(layer)
        blocks = self.transformer.transformer_blocks
        kept: dict[int, Tensor] = {}

        def keep(layer: int, module: nn.Module, args: Any, output: tuple) -> None:
            kept[layer] = output[1]  # a block returns (text tokens, image tokens)

        handles = [
            blocks[layer - 1].register_forward_hook(partial(keep, layer)) for layer in layers
        ]
        try:
            self.transformer(**inputs, skip_layers=list(range(max(layers), len(blocks))))
        finally:
            for handle in handles:
                handle.remove()
        height, width = (side // self.transformer.config.patch_size for side in x_t.shape[-2:])
        maps = (kept[layer].transpose(1, 2).unflatten(2, (height, width)) for layer in layers)
        return [features.to(x_t.dtype) for features in maps]
