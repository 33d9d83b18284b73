# Copyright (c) mmfgm authors.
"""EDM's DDPM++ U-Net once more, slowly and without torch.nn: a function of a flat state dict, in
float64.

It was written after a description in words, without sight of ``mmfgm.models.networks``: a second
opinion for the tests.
"""

import math

import numpy as np
import torch


def _silu(x):
    return x / (1 + np.exp(-x))


def _linear(state, name, x):
    out = np.einsum('oi,ni->no', state[f'{name}.weight'], x)
    return out + state[f'{name}.bias'] if f'{name}.bias' in state else out


def _conv(state, name, x):
    """A convolution with odd kernel: one matrix product for each shift of the picture inside a
    border of zeros."""
    weight, (n, _, height, width) = state[f'{name}.weight'], x.shape
    size = weight.shape[-1]
    border = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border)))
    out = np.zeros((n, weight.shape[0], height * width))
    for i in range(size):
        for j in range(size):
            shifted = padded[:, :, i : i + height, j : j + width].reshape(n, -1, height * width)
            out += weight[:, :, i, j] @ shifted
    return out.reshape(n, -1, height, width) + state[f'{name}.bias'][:, None, None]


def _group_norm(state, name, x, eps=1e-6):
    n, channels, height, width = x.shape
    groups = min(32, channels // 4)
    g = x.reshape(n, groups, channels // groups * height * width)
    mean = g.mean(axis=2, keepdims=True)
    variance = ((g - mean) ** 2).mean(axis=2, keepdims=True)
    normal = ((g - mean) / np.sqrt(variance + eps)).reshape(x.shape)
    return normal * state[f'{name}.weight'][:, None, None] + state[f'{name}.bias'][:, None, None]


def _resample(x, mode):
    if mode == 'down':
        return (
            x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
        ) / 4
    if mode == 'up':
        return x.repeat(2, axis=2).repeat(2, axis=3)
    return x


def _attention(state, name, x):
    n, channels, height, width = x.shape
    out = _conv(state, f'{name}.qkv', _group_norm(state, f'{name}.norm2', x)).reshape(
        n, 3 * channels, height * width
    )
    q, k, v = out[:, 0::3], out[:, 1::3], out[:, 2::3]  # the channels come as q0 k0 v0 q1 k1 v1 ...
    logits = np.einsum('ncq,nck->nqk', q, k) / math.sqrt(channels)
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return _conv(state, f'{name}.proj', np.einsum('nqk,nck->ncq', weights, v).reshape(x.shape))


def _block(state, name, x, emb, mode=None, attention=False):
    h = _conv(
        state, f'{name}.conv0', _resample(_silu(_group_norm(state, f'{name}.norm0', x)), mode)
    )
    h = h + _linear(state, f'{name}.affine', emb)[:, :, None, None]
    h = _conv(state, f'{name}.conv1', _silu(_group_norm(state, f'{name}.norm1', h)))
    if mode or x.shape[1] != h.shape[1]:
        x = _conv(state, f'{name}.skip', _resample(x, mode))
    x = (x + h) * math.sqrt(0.5)
    if attention:
        x = (x + _attention(state, name, x)) * math.sqrt(0.5)
    return x


def edm_unet(
    state,
    x,
    noise_labels,
    onehot=None,
    augment=None,
    *,
    model_channels,
    channel_mult,
    num_blocks,
    attn_resolutions,
):
    """F_x of the images (N, C, H, W) at the noise labels (N,): a float64 tensor."""
    state = {k: v.detach().double().numpy() for k, v in state.items()}
    x, noise_labels = x.detach().double().numpy(), noise_labels.detach().double().numpy()
    half = model_channels // 2
    frequencies = np.array([(1 / 10000) ** (i / (half - 1)) for i in range(half)])
    angles = noise_labels[:, None] * frequencies
    emb = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    if onehot is not None:
        emb = emb + _linear(
            state, 'map_label', onehot.double().numpy() * math.sqrt(onehot.shape[1])
        )
    if augment is not None:
        emb = emb + _linear(state, 'map_augment', augment.double().numpy())
    emb = _silu(_linear(state, 'map_layer0', emb))
    emb = _silu(_linear(state, 'map_layer1', emb))

    resolutions = [x.shape[-1] // 2**level for level in range(len(channel_mult))]
    skips = []
    for level, r in enumerate(resolutions):
        if level == 0:
            x = _conv(state, f'enc.{r}x{r}_conv', x)
        else:
            x = _block(state, f'enc.{r}x{r}_down', x, emb, 'down')
        skips.append(x)
        for i in range(num_blocks):
            x = _block(state, f'enc.{r}x{r}_block{i}', x, emb, attention=r in attn_resolutions)
            skips.append(x)
    for level, r in reversed(list(enumerate(resolutions))):
        if level == len(resolutions) - 1:
            x = _block(state, f'dec.{r}x{r}_in0', x, emb, attention=True)
            x = _block(state, f'dec.{r}x{r}_in1', x, emb)
        else:
            x = _block(state, f'dec.{r}x{r}_up', x, emb, 'up')
        for i in range(num_blocks + 1):
            x = np.concatenate([x, skips.pop()], axis=1)
            attention = i == num_blocks and r in attn_resolutions
            x = _block(state, f'dec.{r}x{r}_block{i}', x, emb, attention=attention)
    assert not skips
    r = resolutions[0]
    x = _conv(state, f'dec.{r}x{r}_aux_conv', _silu(_group_norm(state, f'dec.{r}x{r}_aux_norm', x)))
    return torch.from_numpy(x)


def edm_denoiser(state, x, sigma, onehot=None, augment=None, *, sigma_data=0.5, **architecture):
    """D(x; sigma), the mean of the clean images given x = clean + sigma noise, for sigma (N,): a
    float64 tensor."""
    x, sigma = x.detach().double(), sigma.detach().double()
    total = (sigma**2 + sigma_data**2)[:, None, None, None]
    c_skip, c_in = sigma_data**2 / total, 1 / total.sqrt()
    c_out = sigma[:, None, None, None] * sigma_data / total.sqrt()
    return c_skip * x + c_out * edm_unet(
        state, c_in * x, sigma.log() / 4, onehot, augment, **architecture
    )


def state_shapes(
    img_resolution,
    in_channels,
    out_channels,
    label_dim=0,
    augment_dim=0,
    *,
    model_channels,
    channel_mult,
    num_blocks,
    attn_resolutions,
):
    """The key and shape of every parameter and buffer; a block that resamples keeps the number of
    channels."""
    shapes, width = {}, 4 * model_channels

    def norm(name, channels):
        shapes.update({f'{name}.weight': (channels,), f'{name}.bias': (channels,)})

    def conv(name, cin, cout, size, resample=False):
        shapes.update({f'{name}.weight': (cout, cin, size, size), f'{name}.bias': (cout,)})
        if resample:
            shapes[f'{name}.resample_filter'] = (1, 1, 2, 2)

    def block(name, cin, cout, resample=False, attention=False):
        norm(f'{name}.norm0', cin)
        conv(f'{name}.conv0', cin, cout, 3, resample)
        shapes.update({f'{name}.affine.weight': (cout, width), f'{name}.affine.bias': (cout,)})
        norm(f'{name}.norm1', cout)
        conv(f'{name}.conv1', cout, cout, 3)
        if resample or cin != cout:
            conv(f'{name}.skip', cin, cout, 1, resample)
        if attention:
            norm(f'{name}.norm2', cout)
            conv(f'{name}.qkv', cout, 3 * cout, 1)
            conv(f'{name}.proj', cout, cout, 1)

    if label_dim:
        shapes.update(
            {'map_label.weight': (model_channels, label_dim), 'map_label.bias': (model_channels,)}
        )
    if augment_dim:
        shapes['map_augment.weight'] = (model_channels, augment_dim)
    shapes.update({'map_layer0.weight': (width, model_channels), 'map_layer0.bias': (width,)})
    shapes.update({'map_layer1.weight': (width, width), 'map_layer1.bias': (width,)})
    channels, skips = model_channels, []
    for level, multiplier in enumerate(channel_mult):
        r = img_resolution // 2**level
        if level == 0:
            conv(f'enc.{r}x{r}_conv', in_channels, channels, 3)
        else:
            block(f'enc.{r}x{r}_down', channels, channels, resample=True)
        skips.append(channels)
        for i in range(num_blocks):
            block(
                f'enc.{r}x{r}_block{i}',
                channels,
                model_channels * multiplier,
                attention=r in attn_resolutions,
            )
            channels = model_channels * multiplier
            skips.append(channels)
    for level, multiplier in reversed(list(enumerate(channel_mult))):
        r = img_resolution // 2**level
        if level == len(channel_mult) - 1:
            block(f'dec.{r}x{r}_in0', channels, channels, attention=True)
            block(f'dec.{r}x{r}_in1', channels, channels)
        else:
            block(f'dec.{r}x{r}_up', channels, channels, resample=True)
        for i in range(num_blocks + 1):
            attention = i == num_blocks and r in attn_resolutions
            block(
                f'dec.{r}x{r}_block{i}',
                channels + skips.pop(),
                model_channels * multiplier,
                attention=attention,
            )
            channels = model_channels * multiplier
    norm(f'dec.{img_resolution}x{img_resolution}_aux_norm', channels)
    conv(f'dec.{img_resolution}x{img_resolution}_aux_conv', channels, out_channels, 3)
    return shapes


def random_state_dict(*args, seed=0, **kwargs):
    """Random values for :func:`state_shapes`: every layer hands on values of the order of one, none
    is zero."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in state_shapes(*args, **kwargs).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if key.endswith('resample_filter'):
            state[key] = torch.full(shape, 0.25, dtype=torch.float64)
        elif key.endswith('bias'):
            state[key] = 0.3 * noise
        elif len(shape) == 1:  # the gain of a norm
            state[key] = 1 + 0.3 * noise
        else:
            state[key] = noise / math.sqrt(noise[0].numel())
    return state
