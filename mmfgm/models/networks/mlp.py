# Copyright (c) mmfgm authors.
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfgm.registry import MODELS


class TimeEmbedding(nn.Module):
    """Sinusoidal features of ``t`` in float32, then a two-layer MLP."""

    def __init__(self, dim: int, num_frequencies: int = 64, max_frequency: float = 1000.0):
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(max_frequency), num_frequencies))
        self.register_buffer('frequencies', frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        """``(N,)`` times in [0, 1] to ``(N, dim)``."""
        angles = t[:, None] * self.frequencies.to(t)
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class AdaLNBlock(nn.Module):
    """Residual MLP block, modulated by the embedding as in DiT (Peebles & Xie, 2023):
    adaLN-zero."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(embed_dim, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(emb).chunk(3, dim=1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


@MODELS.register_module()
class AdaLNMLP(nn.Module):
    """Velocity network for points and small images: a residual MLP over the flattened event.

    Args:
        event_shape (Sequence[int]): Shape of one sample, for example ``(2,)`` or ``(1, 8, 8)``.
        width (int): Width of the residual stream. Defaults to 512.
        depth (int): Number of blocks. Defaults to 4.
        embed_dim (int): Width of the time and class embedding. Defaults to 128.
        num_classes (int): 0 for an unconditional network. Label ``num_classes`` means "no class".
        max_frequency (float): Highest angular frequency of the time features, rad per unit of time.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 512,
        depth: int = 4,
        embed_dim: int = 128,
        num_classes: int = 0,
        max_frequency: float = 1000.0,
    ):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_classes = num_classes
        event_dim = math.prod(self.event_shape)
        self.time_embedding = TimeEmbedding(embed_dim, max_frequency=max_frequency)
        self.label_embedding = nn.Embedding(num_classes + 1, embed_dim) if num_classes else None
        self.input = nn.Linear(event_dim, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width, embed_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(embed_dim, 2 * width)
        self.output = nn.Linear(width, event_dim)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``."""
        return self.input

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Velocity at ``x_t (N, *event_shape)`` and ``t (N,)`` in [0, 1], for ``labels (N,)`` or
        none.

        Raises:
            ValueError: If ``labels`` are given to an unconditional network, or missing for a
                conditional one.
        """
        if (labels is None) == (self.label_embedding is not None):
            raise ValueError(
                f'a network of {self.num_classes} classes was called with labels={labels}; '
                'make num_classes agree with the dataset'
            )
        emb = self.time_embedding(t)
        if labels is not None:
            emb = emb + self.label_embedding(labels)
        emb = nn.functional.silu(emb)
        h = self.input(x_t.flatten(1).to(self.input.weight.dtype))
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation(emb).chunk(2, dim=1)
        return self.output(self.norm(h) * (1 + scale) + shift).view_as(x_t).to(x_t.dtype)
