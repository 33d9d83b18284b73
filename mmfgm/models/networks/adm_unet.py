# Copyright (c) mmfgm authors.
"""The U-Net of ADM (Dhariwal & Nichol, 2021) as EDM configures it for ImageNet-64, whose state dict
is the one of the published network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS

from .edm_unet import Conv2d, check_labels, check_levels, group_norm, one_hot

HEAD_CHANNELS = 64
EPS = 1e-5


def _conv(in_channels: int, out_channels: int, kernel: int, **resampling: bool) -> Conv2d:
    layer = Conv2d(in_channels, out_channels, kernel, **resampling)
    # torch's own start, uniform within 1 / sqrt(fan_in), is ADM's in EDM
    layer.reset_parameters()
    return layer


def _zero_(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Resample(nn.Module):
    """Doubles or halves the resolution, without weights; see :class:`Conv2d`."""

    def __init__(self, up: bool):
        super().__init__()
        self.up = up
        self.register_buffer('resample_filter', torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode='nearest') if self.up else F.avg_pool2d(x, 2)


class ADMBlock(nn.Module):
    """Residual block with scale and shift from the embedding, and self-attention with heads of 64
    channels if asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        attention: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        if attention and out_channels % HEAD_CHANNELS:
            raise UsageError(
                f'ADMUNet attends with heads of {HEAD_CHANNELS} channels, of which {out_channels}'
                ' is no multiple; choose another model_channels, channel_mult or attn_resolutions'
            )
        self.dropout = dropout
        self.in_channels = in_channels
        self.norm0 = group_norm(in_channels, EPS)
        self.conv0 = _conv(in_channels, out_channels, 3, up=up, down=down)
        self.affine = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = group_norm(out_channels, EPS)
        self.conv1 = _zero_(_conv(out_channels, out_channels, 3))
        self.skip: nn.Module | None = None
        if in_channels != out_channels:
            self.skip = _conv(in_channels, out_channels, 1, up=up, down=down)
        elif up or down:
            self.skip = Resample(up)
        self.norm2 = self.qkv = self.proj = None
        if attention:
            self.norm2 = group_norm(out_channels, EPS)
            self.qkv = _conv(out_channels, 3 * out_channels, 1)
            self.proj = _zero_(_conv(out_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x (N, C, H, W)`` and ``emb (N, E)`` to ``(N, C', H', W')``."""
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(h) * (1 + scale) + shift)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = h + (x if self.skip is None else self.skip(x))
        return x if self.qkv is None else x + self.proj(self._attend(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # the 3 C outputs of qkv are those of one head after the other, and (q, k, v) of a head's
        # channel 0, of its channel 1, ...; the fused kernels want channels last
        heads = self.qkv(x).view(n, c // HEAD_CHANNELS, HEAD_CHANNELS, 3, height * width)
        q, k, v = heads.permute(3, 0, 1, 4, 2).contiguous()
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(2, 3).reshape(n, c, height, width)


@MODELS.register_module()
class ADMUNet(nn.Module):
    """ADM's U-Net as EDM configures it; :class:`EDMVelocity` makes a flow of it.

    Args:
        img_resolution (int): Height and width of images; halved between levels.
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        label_dim (int): Number of classes; 0 for an unconditional network.
        augment_dim (int): Dimension of EDM's augmentation label, which is zero outside of EDM's own
            training; 0 for a network without. Defaults to 0.
        model_channels (int): Channels at full resolution before ``channel_mult``. Defaults to 192.
        channel_mult (Sequence[int]): Multiplier of each level. Defaults to ``(1, 2, 3, 4)``.
        num_blocks (int): Blocks per level of the encoder; the decoder has one more. Defaults to 3.
        attn_resolutions (Sequence[int]): Resolutions with self-attention. Defaults to
            ``(32, 16, 8)``.
        dropout (float): Dropout probability. Defaults to 0.1, EDM's for ImageNet-64.

    Raises:
        UsageError: If the resolution cannot be halved often enough, or channels do not fill a
            group or a head.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
    ):
        super().__init__()
        check_levels(type(self).__name__, img_resolution, model_channels, channel_mult)
        self.img_resolution = img_resolution
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.model_channels = model_channels
        emb_channels = 4 * model_channels
        block = dict(emb_channels=emb_channels, dropout=dropout)

        self.map_augment = (
            _zero_(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        )
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None
        if label_dim:
            nn.init.normal_(self.map_label.weight)

        levels = [
            (img_resolution >> level, mult * model_channels)
            for level, mult in enumerate(channel_mult)
        ]
        channels = levels[0][1]
        skips = [channels]
        self.enc = nn.ModuleDict(
            {f'{img_resolution}x{img_resolution}_conv': _conv(in_channels, channels, 3)}
        )
        for r, width in levels:
            if r != img_resolution:
                self.enc[f'{r}x{r}_down'] = ADMBlock(channels, channels, down=True, **block)
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f'{r}x{r}_block{i}'] = ADMBlock(
                    channels, width, attention=r in attn_resolutions, **block
                )
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for r, width in reversed(levels):
            if r == levels[-1][0]:
                self.dec[f'{r}x{r}_in0'] = ADMBlock(channels, channels, attention=True, **block)
                self.dec[f'{r}x{r}_in1'] = ADMBlock(channels, channels, **block)
            else:
                self.dec[f'{r}x{r}_up'] = ADMBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                self.dec[f'{r}x{r}_block{i}'] = ADMBlock(
                    channels + skips.pop(), width, attention=r in attn_resolutions, **block
                )
                channels = width
        self.out_norm = group_norm(channels, EPS)
        self.out_conv = _zero_(_conv(channels, out_channels, 3))

        # cuDNN and oneDNN are fastest there; activations follow the weights
        self.to(memory_format=torch.channels_last)

    def embed(
        self, noise_labels: Tensor, labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """Noise level, class and augmentation to ``(N, 4 * model_channels)``."""
        dtype = self.map_layer0.weight.dtype
        half = self.model_channels // 2
        exact = torch.promote_types(noise_labels.dtype, torch.float32)
        i = torch.arange(half, device=noise_labels.device, dtype=exact)
        # i / half stays below 1, and cosines come first: both unlike in EDMUNet
        angles = noise_labels[:, None] * (1 / 10000) ** (i / half)
        emb = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(one_hot(labels, self.label_dim).to(dtype))
        return F.silu(emb)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """``F_x (N, out_channels, H, W)``; the arguments and errors are those of
        :meth:`EDMUNet.forward`."""
        check_labels(labels, self.label_dim)
        emb = self.embed(noise_labels, labels, augment_labels)
        x = x.to(self.map_layer0.weight.dtype)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, ADMBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if layer.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
