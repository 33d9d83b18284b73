# Copyright (c) mmfgm authors.
"""What latent models need around them: a decoder to images, and the embedding of the empty
prompt."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfgm.datasets import CachedPrompts
from mmfgm.registry import TASK_UTILS

from .networks.sd3 import diffusers_module, load_pretrained


@TASK_UTILS.register_module()
class LatentDecoder:
    """Latents to images through a pipeline's VAE; not a network of the model, so nothing trains or
    shards it.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        subfolder (str): Defaults to ``'vae'``.
        dtype (str): Defaults to ``'float32'``: SD3's VAE overflows in float16.
        batch_size (int): Images decoded at a time. Defaults to 8.
    """

    def __init__(
        self, pretrained: str, subfolder: str = 'vae', dtype: str = 'float32', batch_size: int = 8
    ):
        self.vae = load_pretrained(
            diffusers_module().AutoencoderKL,
            pretrained,
            subfolder,
            torch_dtype=getattr(torch, dtype),
        )
        self.vae.requires_grad_(False).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents ``(N, C, h, w)`` to float32 images ``(N, 3, H, W)`` in [-1, 1] up to
        overshoot."""
        vae = self.vae.to(latents.device)
        z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (
            vae.config.shift_factor or 0
        )
        return torch.cat([vae.decode(part).sample.float() for part in z.split(self.batch_size)])


@TASK_UTILS.register_module()
class CachedNullPrompt:
    """The condition that means "no prompt": the cached embedding of the empty prompt.

    Args:
        path (str): The cache of prompts (see :class:`~mmfgm.datasets.CachedPrompts`), which holds
            it.
    """

    def __init__(self, path: str):
        self.embeds = CachedPrompts(path).null

    def __call__(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Conditions of a batch to those of as many empty prompts."""
        return {**cond, **{key: self._like(self.embeds[key], cond[key]) for key in self.embeds}}

    @staticmethod
    def _like(null: Tensor, embeds: Tensor) -> Tensor:
        null = null.to(embeds)
        if null.ndim == 2:  # tokens: as many as the prompts of the batch have
            null = pad(null, (0, 0, 0, embeds.shape[1] - len(null)))
        return null.expand_as(embeds)
