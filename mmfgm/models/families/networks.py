# Copyright (c) mmfgm authors.
"""What velocity networks over diffusers' stock transformers have in common."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mmfgm.errors import UsageError

from .blocks import check_layer, recompute
from .hub import diffusers_module, load_pretrained


def stock_transformer(
    owner: str,
    network_class: str,
    pretrained: str | None,
    config: dict[str, Any] | None,
    subfolder: str,
    revision: str | None,
    variant: str | None,
    dtype: str,
) -> Any:
    """A class of diffusers with the weights of a pipeline, or with random ones.

    Further arguments are those of :class:`DiffusersNetwork`.

    Args:
        owner (str): The network that asks for it, for the message.
        network_class (str): The transformer's name in diffusers.

    Raises:
        UsageError: Unless exactly one of ``pretrained`` and ``config`` is given, or if weights
            cannot be loaded.
    """
    cls = getattr(diffusers_module(), network_class)
    if pretrained is not None and config is None:
        place = dict(revision=revision, variant=variant, torch_dtype=getattr(torch, dtype))
        return load_pretrained(cls, pretrained, subfolder, **place)
    if config is not None and pretrained is None:
        return cls(**config).to(getattr(torch, dtype))
    raise UsageError(
        f"{owner} takes either pretrained (a pipeline in diffusers' format) or config (of a random"
        f' initialisation), but got pretrained={pretrained!r}, config={config!r}; set one of them'
    )


def pack(x: Tensor) -> Tensor:
    """Latents ``(N, C, h, w)`` to tokens of 2 x 2 of them, ``(N, h w / 4, 4 C)``."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens of 2 x 2 latents ``(N, h w / 4, 4 C)`` to the latents ``(N, C, h, w)``."""
    return pixel_shuffle(as_map(tokens, height // 2, width // 2), 2)


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens ``(N, h w, D)`` as a map ``(N, D, h, w)``."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


class DiffusersNetwork(nn.Module):
    """One of diffusers' transformers on latents ``(N, C, h, w)``; a family's class says how it is
    called, in ``forward``.

    Args:
        latent_size (int, optional): Height and width of the latents. Defaults to those that the
            transformer was made for; ``forward`` takes any.
        pretrained (str, optional): Hub id or local folder of a pipeline in diffusers' format.
        config (dict, optional): Arguments of the transformer for a random initialisation; exactly
            one of ``pretrained`` and ``config``.
        subfolder (str): Where the transformer lies in the pipeline. Defaults to ``'transformer'``.
        revision (str, optional): Git revision on the hub.
        variant (str, optional): Variant of the weight files, for example ``'fp16'``.
        dtype (str): Type the weights are kept in. Defaults to ``'float32'``: optimizers need it.
        checkpointing (bool | float | str): Recompute all transformer blocks in the backward pass, a
            share of them, or ``'attention'``: all but attention. Defaults to False.

    Attributes:
        network_class (str): The transformer's name in diffusers.
        pretrained (str, optional): As given.
        blocks (tuple[str, ...]): The transformer's attributes with the blocks whose output a GAN
            may see, in their order.

    Raises:
        UsageError: If weights cannot be loaded, or the latents do not fit the network.
    """

    network_class: str
    blocks: tuple[str, ...]

    def __init__(
        self,
        latent_size: int | None = None,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str = 'transformer',
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = 'float32',
        checkpointing: bool | float | str = False,
    ):
        super().__init__()
        self.pretrained = pretrained
        self.transformer = stock_transformer(
            type(self).__name__,
            self.network_class,
            pretrained,
            config,
            subfolder,
            revision,
            variant,
            dtype,
        )
        self.event_shape = self._event_shape(latent_size)
        recompute(self.transformer, checkpointing)

    def _event_shape(self, latent_size: Any) -> tuple[int, int, int]:
        """``(C, h, w)``, or a UsageError if such latents do not fit the transformer."""
        latent_size = latent_size or self.transformer.config.sample_size
        patch = self.transformer.config.patch_size
        if latent_size % patch:
            raise UsageError(
                f'expected latent_size to be a multiple of the patch size {patch}, found'
                f' {latent_size}; choose another size of images'
            )
        return (self.transformer.config.in_channels, latent_size, latent_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights."""
        return next(self.transformer.parameters()).dtype

    def check_feature_layer(self, layer: int) -> None:
        """Raise a UsageError unless there is a layer of that number, counted from 1."""
        check_layer(self.transformer, self.blocks, layer)
