# Copyright (c) mmfgm authors.
"""The transformer of SiT (Ma et al., 2024), whose state dict is the one of the published
networks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS

from ..recomputation import choose_recomputed, recomputed

NUM_FREQUENCIES = 128
MAX_PERIOD = 10000


def _sinusoids(positions: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines ``(N, len(omega))`` of ``positions (N,)``."""
    angles = positions[:, None] * omega
    return angles.sin(), angles.cos()


def _geometric(n: int, like: Tensor) -> Tensor:
    """``n`` angular frequencies ``10000^(-i / n)``, from 1 down."""
    i = torch.arange(n, dtype=like.dtype, device=like.device)
    return torch.exp(-math.log(MAX_PERIOD) * i / n)


def _grid_embedding(width: int, side: int) -> Tensor:
    """Fixed embedding ``(1, side * side, width)`` of patches in rows: sines and cosines of the
    column in the first half of the channels, of the row in the second."""
    positions = torch.arange(side, dtype=torch.float64)
    axis = torch.cat(_sinusoids(positions, _geometric(width // 4, positions)), dim=1)
    columns = axis.repeat(side, 1)
    rows = axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens ``(N, T, D)``, shifted and scaled by ``(N, D)``."""
    return h * (1 + scale[:, None]) + shift[:, None]


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class PatchEmbedding(nn.Module):
    """Images ``(N, C, H, W)`` to tokens ``(N, T, D)``, row after row of patches."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class SiTTimeEmbedding(nn.Module):
    """Times ``(N,)`` to ``(N, D)``; the sinusoids are as exact as the times are."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        sines, cosines = _sinusoids(t, _geometric(NUM_FREQUENCIES, t))
        return self.mlp(torch.cat([cosines, sines], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """Labels ``(N,)`` to ``(N, D)``; label ``num_classes`` means "no class"."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens ``(N, T, D)``."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        # (N, T, 3 D) to q, k, v (N, heads, T, D / heads)
        q, k, v = self.qkv(h).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with four times the width between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate='tanh'))


class SiTBlock(nn.Module):
    """Attention and feed-forward layer, each with shift, scale and gate from the embedding
    (adaLN-zero; Peebles & Xie, 2023)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = _norm(width)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = _norm(width)
        self.mlp = FeedForward(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Tokens ``(N, T, D)``, embedding ``(N, D)``."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(emb).chunk(6, 1)
        h = h + gate_1[:, None] * self.attn(_modulate(self.norm1(h), shift_1, scale_1))
        return h + gate_2[:, None] * self.mlp(_modulate(self.norm2(h), shift_2, scale_2))


class FinalLayer(nn.Module):
    """Tokens ``(N, T, D)`` to the pixels of their patches, ``(N, T, p * p * C)``."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm_final = _norm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(emb).chunk(2, dim=1)
        return self.linear(_modulate(self.norm_final(h), shift, scale))


@MODELS.register_module()
class SiT(nn.Module):
    """Velocity of a Scalable Interpolant Transformer of the linear path.

    The published networks run from noise at time 0 to data at time 1 and predict ``x_0 - eps``, so
    that ``u(x_t, t) = -SiT(x_t, 1 - t)``; sign and time are turned round here and only here. The
    state dict is theirs, so that a published file loads by ``teacher=dict(checkpoint=FILE,
    prefix='')``. The defaults are SiT-XL/2 of 256-pixel images.

    Args:
        latent_size (int): Height and width of the latents: an eighth of the image's.
        patch_size (int): Side of a patch. Defaults to 2.
        in_channels (int): Channels of the latents. Defaults to 4.
        width (int): Of the tokens. Defaults to 1152.
        depth (int): Number of blocks. Defaults to 28.
        num_heads (int): Of the attention. Defaults to 16.
        num_classes (int): Label ``num_classes`` means "no class". Defaults to 1000.
        learn_sigma (bool): Whether the last layer has twice the channels, of which the second half
            comes from DiT and is not used, as in the published network of 256 pixels. Defaults to
            True.
        checkpointing (bool | float | str): Recompute all blocks in the backward pass, a share of
            them, or ``'attention'``: all but attention. Defaults to False.

    Attributes:
        feature_dim (int): Channels of the features of a layer, which a GAN takes.

    Raises:
        UsageError: If patches do not fill the latents, or heads and embedding the width.
    """

    def __init__(
        self,
        latent_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        width: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        checkpointing: bool | float | str = False,
    ):
        super().__init__()
        if patch_size < 1 or latent_size % patch_size:
            raise UsageError(
                f'expected a latent_size that is a multiple of patch_size={patch_size}, found'
                f' {latent_size}; choose another size of the images, or another patch_size'
            )
        if num_heads < 1 or width % num_heads or width % 4:
            raise UsageError(
                f'expected a width that is a multiple of num_heads={num_heads} and of 4, found'
                f' {width}; make the two agree'
            )
        self.event_shape = (in_channels, latent_size, latent_size)
        self.num_classes = num_classes
        self.feature_dim = width
        self.patch_size = patch_size
        self.checkpointing = checkpointing
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbedding(in_channels, width, patch_size)
        # a buffer, so that nothing ever trains it
        self.register_buffer('pos_embed', _grid_embedding(width, latent_size // patch_size))
        self.t_embedder = SiTTimeEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)
        self.blocks = nn.ModuleList(SiTBlock(width, num_heads) for _ in range(depth))
        choose_recomputed(self.blocks, checkpointing)
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As the published networks were: each block starts as the identity, the output as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (
            self.y_embedder.embedding_table,
            self.t_embedder.mlp[0],
            self.t_embedder.mlp[2],
        ):
            nn.init.normal_(embedding.weight, std=0.02)
        modulations = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def check_feature_layer(self, layer: int) -> None:
        """Raise a UsageError unless there is a layer of that number, counted from 1."""
        if not 1 <= layer <= len(self.blocks):
            raise UsageError(
                f'feature_layer={layer} is out of range: this network has the layers 1 to'
                f' {len(self.blocks)}'
            )

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``."""
        return self.x_embedder.proj

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        feature_layer: int | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Velocity ``(N, C, h, w)``, or the tokens after a layer as a map ``(N, D, h / p, w / p)``.

        Args:
            x_t (Tensor): Latents ``(N, C, h, w)``.
            t (Tensor): ``(N,)`` in [0, 1].
            labels (Tensor): ``(N,)`` int64 in [0, num_classes].
            feature_layer (int | Sequence[int], optional): Return the features after this layer,
                counted from 1, or a list of those after several, instead of the velocity; later
                layers are not run.

        Raises:
            UsageError: If there is no such layer.
            ValueError: Without labels.
        """
        if labels is None:
            raise ValueError(
                f'a network of {self.num_classes} classes was called without labels; make the'
                ' dataset give them'
            )
        h = self.x_embedder(x_t.to(self.x_embedder.proj.weight.dtype))
        h = h + self.pos_embed.to(h.dtype)
        emb = self.t_embedder(1 - t) + self.y_embedder(labels)
        if isinstance(feature_layer, int):
            return self._features(h, emb, [feature_layer], x_t)[0]
        if feature_layer is not None:
            return self._features(h, emb, feature_layer, x_t)
        for block in self.blocks:
            h = self._run(block, h, emb)
        return -self._to_image(self.final_layer(h, emb)).to(x_t.dtype)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return recomputed(block, h, emb)
        return block(h, emb)

    def _features(self, h: Tensor, emb: Tensor, layers: Sequence[int], x_t: Tensor) -> list[Tensor]:
        for layer in layers:
            self.check_feature_layer(layer)
        kept = {}
        for layer, block in enumerate(self.blocks[: max(layers)], 1):
            h = self._run(block, h, emb)
            kept[layer] = h
        side = self.event_shape[1] // self.patch_size
        maps = (kept[layer].transpose(1, 2).unflatten(2, (side, side)) for layer in layers)
        return [features.to(x_t.dtype) for features in maps]

    def _to_image(self, patches: Tensor) -> Tensor:
        """Patches ``(N, T, p * p * C')`` to the first channels ``(N, C, h, w)``."""
        channels, size, _ = self.event_shape
        p = self.patch_size
        rows = patches.unflatten(1, (size // p, size // p)).unflatten(3, (p, p, -1))
        # (N, row, column, p, p, C') to (N, C', row, p, column, p)
        image = rows.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return image[:, :channels]
