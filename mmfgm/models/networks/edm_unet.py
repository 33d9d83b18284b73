# Copyright (c) mmfgm authors.
"""The DDPM++ U-Net of EDM (Karras et al., 2022), whose state dict is the one of the published
networks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS

# initialisation gains of layers that start near zero, and of the queries, keys and values
NEAR_ZERO = 1e-5
ATTENTION = math.sqrt(0.2)


def _xavier_(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    """In 32 groups, or fewer of at least 4 channels each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def check_levels(
    name: str, img_resolution: int, model_channels: int, channel_mult: Sequence[int]
) -> None:
    """Raise a UsageError of the network ``name`` if the resolution cannot be halved often enough,
    or channels do not fill a group."""
    factor = 2 ** (len(channel_mult) - 1)
    if img_resolution % factor:
        raise UsageError(
            f'{name} with {len(channel_mult)} levels needs an img_resolution divisible by'
            f' {factor}, but got {img_resolution}; shorten channel_mult or resize the images'
        )
    for channels in {model_channels, *(mult * model_channels for mult in channel_mult)}:
        if model_channels < 4 or channels % min(32, channels // 4):
            raise UsageError(
                f'{name} normalises {channels} channels in groups of min(32, channels / 4):'
                f' choose model_channels (now {model_channels}) as a multiple of 32, or below'
                ' 128 as a multiple of 4'
            )


def check_labels(labels: Tensor | None, label_dim: int) -> None:
    """Raise a ValueError if labels are given to an unconditional network, missing for a conditional
    one, or (on the CPU, where looking is free) outside ``[0, label_dim]``."""
    if (labels is None) == bool(label_dim):
        raise ValueError(
            f'a network of {label_dim} classes was called with labels={labels}; make'
            ' label_dim agree with the dataset'
        )
    if (
        labels is not None
        and labels.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and labels.numel()
        and not 0 <= labels.min() <= labels.max() <= label_dim
    ):
        raise ValueError(
            f'labels must lie in [0, {label_dim}] ({label_dim} means "no class"), but'
            f' lie in [{int(labels.min())}, {int(labels.max())}]'
        )


def one_hot(labels: Tensor, label_dim: int) -> Tensor:
    """``(N, label_dim)``, without a look at the values, which would wait for the GPU; ``label_dim``
    itself means "no class" and has no 1."""
    return labels[:, None] == torch.arange(label_dim, device=labels.device)


class Conv2d(nn.Conv2d):
    """Convolution that keeps the resolution, after doubling (``up``) or halving (``down``) it.

    The [1, 1] filter of both is the 2x2 mean and nearest-neighbour doubling; ``resample_filter``
    only carries it in the state dict.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        gain: float = 1.0,
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.up = up
        self.down = down
        if up or down:
            self.register_buffer('resample_filter', torch.full((1, 1, 2, 2), 0.25))
        _xavier_(self, gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode='nearest')
        if self.down:
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


class UNetBlock(nn.Module):
    """Residual block with a shift from the embedding, and single-head self-attention if asked
    for."""

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
        self.dropout = dropout
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up, down)
        self.affine = _xavier_(nn.Linear(emb_channels, out_channels))
        self.norm1 = group_norm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=NEAR_ZERO)
        self.skip = (
            Conv2d(in_channels, out_channels, 1, up, down)
            if up or down or in_channels != out_channels
            else None
        )
        self.norm2 = self.qkv = self.proj = None
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=ATTENTION)
            self.proj = Conv2d(out_channels, out_channels, 1, gain=NEAR_ZERO)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x (N, C, H, W)`` and ``emb (N, E)`` to ``(N, C', H', W')``."""
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = F.dropout(F.silu(self.norm1(h)), self.dropout, self.training)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.qkv is not None:
            x = (x + self.proj(self._attend(self.norm2(x)))) * math.sqrt(0.5)
        return x

    def _attend(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # channel-major: the 3 C outputs of qkv are (q, k, v) of channel 0, of channel 1, ...
        # the fused kernels want channels last
        q, k, v = (
            self.qkv(x).view(n, c, 3, height * width).permute(2, 0, 3, 1)[:, :, None].contiguous()
        )
        # softmax(q k / sqrt(C)) with its sums in float32 whatever the inputs are
        out = F.scaled_dot_product_attention(q, k, v)
        return out.squeeze(1).transpose(1, 2).reshape(n, c, height, width)


@MODELS.register_module()
class EDMUNet(nn.Module):
    """DDPM++ U-Net as EDM configures it; :class:`EDMVelocity` and :class:`UNetVelocity` make a flow
    of it.

    Args:
        img_resolution (int): Height and width of images; halved between levels.
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        label_dim (int): Number of classes; 0 for an unconditional network.
        augment_dim (int): Dimension of EDM's augmentation label, which is zero outside of EDM's own
            training; 0 for a network without. Defaults to 0.
        model_channels (int): Channels at full resolution before ``channel_mult``. Defaults to 128.
        channel_mult (Sequence[int]): Multiplier of each level. Defaults to ``(2, 2, 2)``.
        num_blocks (int): Blocks per level of the encoder; the decoder has one more. Defaults to 4.
        attn_resolutions (Sequence[int]): Resolutions with self-attention. Defaults to ``(16,)``.
        dropout (float): Dropout probability. Defaults to 0.13, EDM's for CIFAR-10.

    Raises:
        UsageError: If the resolution cannot be halved often enough, or channels do not fill a
            group.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.13,
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

        self.map_label = _xavier_(nn.Linear(label_dim, model_channels)) if label_dim else None
        self.map_augment = (
            _xavier_(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        )
        self.map_layer0 = _xavier_(nn.Linear(model_channels, emb_channels))
        self.map_layer1 = _xavier_(nn.Linear(emb_channels, emb_channels))

        resolutions = [img_resolution >> level for level in range(len(channel_mult))]
        self.enc = nn.ModuleDict(
            {f'{img_resolution}x{img_resolution}_conv': Conv2d(in_channels, model_channels, 3)}
        )
        channels = model_channels
        skips = [model_channels]
        for level, (r, mult) in enumerate(zip(resolutions, channel_mult)):
            if level > 0:
                self.enc[f'{r}x{r}_down'] = UNetBlock(channels, channels, down=True, **block)
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f'{r}x{r}_block{i}'] = UNetBlock(
                    channels, mult * model_channels, attention=r in attn_resolutions, **block
                )
                channels = mult * model_channels
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (r, mult) in reversed(list(enumerate(zip(resolutions, channel_mult)))):
            if level == len(channel_mult) - 1:
                self.dec[f'{r}x{r}_in0'] = UNetBlock(channels, channels, attention=True, **block)
                self.dec[f'{r}x{r}_in1'] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f'{r}x{r}_up'] = UNetBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                self.dec[f'{r}x{r}_block{i}'] = UNetBlock(
                    channels + skips.pop(),
                    mult * model_channels,
                    attention=i == num_blocks and r in attn_resolutions,
                    **block,
                )
                channels = mult * model_channels
        self.dec[f'{r}x{r}_aux_norm'] = group_norm(channels)
        self.dec[f'{r}x{r}_aux_conv'] = Conv2d(channels, out_channels, 3, gain=NEAR_ZERO)

        # cuDNN and oneDNN are fastest there; activations follow the weights
        self.to(memory_format=torch.channels_last)

    def embed(
        self, noise_labels: Tensor, labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """Noise level, class and augmentation to ``(N, 4 * model_channels)``."""
        dtype = self.map_layer0.weight.dtype
        half = self.model_channels // 2
        i = torch.arange(
            half,
            device=noise_labels.device,
            dtype=torch.promote_types(noise_labels.dtype, torch.float32),
        )
        # i / (half - 1) reaches 1: the endpoint is included
        angles = noise_labels[:, None] * (1 / 10000) ** (i / (half - 1))
        emb = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
        if self.map_label is not None:
            onehot = one_hot(labels, self.label_dim).to(dtype)
            emb = emb + self.map_label(onehot * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """``F_x (N, out_channels, H, W)``.

        Args:
            x (Tensor): ``(N, in_channels, H, W)``.
            noise_labels (Tensor): ``(N,)``; EDM's preconditioning passes ``ln(sigma) / 4``.
            labels (Tensor, optional): ``(N,)`` int64 in [0, label_dim]; ``label_dim`` means "no
                class".
            augment_labels (Tensor, optional): ``(N, augment_dim)``; None for images that are not
                augmented.

        Raises:
            ValueError: If labels are given to an unconditional network, missing for a conditional
                one, or (on the CPU, where looking is free) outside the classes.
        """
        check_labels(labels, self.label_dim)
        emb = self.embed(noise_labels, labels, augment_labels)
        x = x.to(self.map_layer0.weight.dtype)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in list(self.dec.values())[:-2]:
            if layer.conv0.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        norm, conv = list(self.dec.values())[-2:]
        return conv(F.silu(norm(x)))
