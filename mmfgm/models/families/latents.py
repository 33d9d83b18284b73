# Copyright (c) mmfgm authors.
"""What latent models need around them: encoder and decoder of images, and the embedding of the
empty prompt."""

import os.path as osp
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfgm.datasets import CachedPrompts
from mmfgm.registry import TASK_UTILS

from ..weights import check_finite
from .base import LatentEncoder
from .hub import diffusers_module, load_or_explain, load_pretrained


class VAEEncoder(LatentEncoder):
    """The encoder of a pipeline's VAE, in float32, as half precision costs it accuracy.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        kind (str): What that should be, for messages.
        subfolder (str): Defaults to ``'vae'``; ``''`` for a VAE that was published alone.

    Attributes:
        vae_class (str): The VAE's name in diffusers.

    Raises:
        UsageError: If it is missing, gated, or not whole.
    """

    vae_class: str

    def __init__(self, pretrained: str, kind: str, subfolder: str = 'vae'):
        cls = getattr(diffusers_module(), self.vae_class)
        vae = load_or_explain(
            lambda: cls.from_pretrained(pretrained, subfolder=subfolder), pretrained, kind
        )
        check_finite(vae.state_dict(), osp.join(pretrained, subfolder))
        self.vae = vae.float().eval()
        self.components: dict[str, Any] = dict(vae=self.vae)


class KLEncoder(VAEEncoder):
    """Of an ``AutoencoderKL``: ``(mean - shift_factor) * scaling_factor`` of its distribution;
    arguments and errors as of :class:`VAEEncoder`."""

    vae_class = 'AutoencoderKL'

    def __init__(self, pretrained: str, kind: str, subfolder: str = 'vae'):
        super().__init__(pretrained, kind, subfolder)
        config = self.vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels
        self.settings = dict(shift_factor=config.shift_factor, scaling_factor=config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        mean = self.vae.encode(images.to(self.vae.device)).latent_dist.mean
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor


@TASK_UTILS.register_module()
class LatentDecoder:
    """Latents to images through a pipeline's VAE; not a network of the model, so nothing trains or
    shards it.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        subfolder (str): Defaults to ``'vae'``; ``''`` for a VAE that was published alone.
        dtype (str): Defaults to ``'float32'``: VAEs may overflow in float16.
        batch_size (int): Images decoded at a time. Defaults to 8.

    Attributes:
        vae_class (str): The VAE's name in diffusers.
    """

    vae_class = 'AutoencoderKL'

    def __init__(
        self, pretrained: str, subfolder: str = 'vae', dtype: str = 'float32', batch_size: int = 8
    ):
        self.vae = load_pretrained(
            getattr(diffusers_module(), self.vae_class),
            pretrained,
            subfolder,
            torch_dtype=getattr(torch, dtype),
        )
        self.vae.requires_grad_(False).eval()
        self.batch_size = batch_size

    def unpack(self, latents: Tensor) -> Tensor:
        """Latents of the network to those that the VAE decodes, in its dtype."""
        config = self.vae.config
        z = latents.to(self.vae.dtype)
        return z / config.scaling_factor + (config.get('shift_factor') or 0)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the VAE to images ``(N, 3, H, W)``."""
        return self.vae.decode(latents).sample

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents ``(N, C, h, w)`` to float32 images ``(N, 3, H, W)`` in [-1, 1] up to
        overshoot."""
        self.vae.to(latents.device)
        parts = self.unpack(latents).split(self.batch_size)
        return torch.cat([self.decode(part).float() for part in parts])


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
