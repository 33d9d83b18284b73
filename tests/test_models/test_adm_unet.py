# Copyright (c) mmfgm authors.
"""EDM's ADM network of ImageNet-64, held against a function of its state dict in numpy and float64,
and read from a file in EDM's format."""

import math

import numpy as np
import pytest
import torch

from mmfgm.errors import UsageError
from mmfgm.models import ADMUNet, EDMVelocity, load_network, read_edm_pickle
from mmfgm.tools.convert_edm import convert
from tests.edm_reference import _conv, _group_norm, _linear, _resample, _silu
from tests.test_models.test_edm_checkpoint import edm_file  # noqa: F401

# the first level is wider than the embedding, the second has two heads
TINY = dict(
    img_resolution=8,
    in_channels=3,
    out_channels=3,
    label_dim=5,
    augment_dim=0,
    model_channels=32,
    channel_mult=[2, 4],
    num_blocks=1,
    attn_resolutions=[4],
    dropout=0.1,
)
PUBLISHED = dict(img_resolution=64, in_channels=3, out_channels=3, label_dim=1000)


def shapes(
    img_resolution,
    in_channels,
    out_channels,
    label_dim,
    augment_dim=0,
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attn_resolutions=(32, 16, 8),
    dropout=0.1,
):
    """Name to shape of every tensor, by the description and not by our class."""
    emb = 4 * model_channels
    weights = {'map_layer0': (emb, model_channels), 'map_layer1': (emb, emb)}
    filters = []

    def block(name, cin, cout, attention=False, resample=False):
        weights[f'{name}.norm0'] = (cin,)
        weights[f'{name}.conv0'] = (cout, cin, 3, 3)
        weights[f'{name}.affine'] = (2 * cout, emb)
        weights[f'{name}.norm1'] = (cout,)
        weights[f'{name}.conv1'] = (cout, cout, 3, 3)
        if cin != cout:
            weights[f'{name}.skip'] = (cout, cin, 1, 1)
        if resample:
            filters.extend([f'{name}.conv0', f'{name}.skip'])
        if attention:
            weights[f'{name}.norm2'] = (cout,)
            weights[f'{name}.qkv'] = (3 * cout, cout, 1, 1)
            weights[f'{name}.proj'] = (cout, cout, 1, 1)

    levels = [(img_resolution >> i, m * model_channels) for i, m in enumerate(channel_mult)]
    c = levels[0][1]
    weights[f'enc.{img_resolution}x{img_resolution}_conv'] = (c, in_channels, 3, 3)
    skips = [c]
    for r, width in levels:
        if r < img_resolution:
            block(f'enc.{r}x{r}_down', c, c, resample=True)
            skips.append(c)
        for i in range(num_blocks):
            block(f'enc.{r}x{r}_block{i}', c, width, r in attn_resolutions)
            c = width
            skips.append(c)
    for r, width in levels[::-1]:
        if r == levels[-1][0]:
            block(f'dec.{r}x{r}_in0', c, c, attention=True)
            block(f'dec.{r}x{r}_in1', c, c)
        else:
            block(f'dec.{r}x{r}_up', c, c, resample=True)
        for i in range(num_blocks + 1):
            block(f'dec.{r}x{r}_block{i}', c + skips.pop(), width, r in attn_resolutions)
            c = width
    weights['out_norm'] = (c,)
    weights['out_conv'] = (out_channels, c, 3, 3)
    found = {'map_label.weight': (emb, label_dim)}
    for name, shape in weights.items():
        found[f'{name}.weight'] = shape
        found[f'{name}.bias'] = shape[:1]
    return {**found, **{f'{name}.resample_filter': (1, 1, 2, 2) for name in filters}}


def random_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(**TINY).items():
        noise = torch.randn(shape, generator=g)
        if name.endswith('filter'):
            state[name] = torch.full(shape, 0.25)
        elif len(shape) == 1:
            state[name] = 0.3 * noise + (1.0 if 'norm' in name and 'weight' in name else 0.0)
        else:
            state[name] = noise / math.sqrt(noise[0].numel())
    return state


def reference(state, x, noise_labels, onehot):
    """F_x, by the description: what is unlike in DDPM++ is said where it is."""
    state = {name: value.double().numpy() for name, value in state.items()}
    x = x.double().numpy()
    c, r, attention = TINY['model_channels'], TINY['img_resolution'], TINY['attn_resolutions']

    def norm(name, h):
        return _group_norm(state, name, h, eps=1e-5)

    def attend(name, h):
        n, channels, height, width = h.shape
        qkv = _conv(state, f'{name}.qkv', norm(f'{name}.norm2', h)).reshape(n, 3 * channels, -1)
        out = np.empty((n, channels, height * width))
        for head in range(channels // 64):
            # three outputs for each channel of a head, whose channels follow each other
            q, k, v = (qkv[:, 192 * head + i : 192 * (head + 1) : 3] for i in range(3))
            logits = np.einsum('ncq,nck->nqk', q, k) / 8
            weights = np.exp(logits - logits.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
            out[:, 64 * head : 64 * (head + 1)] = np.einsum('nqk,nck->ncq', weights, v)
        return _conv(state, f'{name}.proj', out.reshape(h.shape))

    def block(name, h, mode=None):
        out = _conv(state, f'{name}.conv0', _resample(_silu(norm(f'{name}.norm0', h)), mode))
        # scale and shift, after the norm
        affine = _linear(state, f'{name}.affine', emb)[:, :, None, None]
        half = affine.shape[1] // 2
        out = _silu(norm(f'{name}.norm1', out) * (1 + affine[:, :half]) + affine[:, half:])
        out = _conv(state, f'{name}.conv1', out)
        h = _resample(h, mode)
        # no weights where only the resolution changes, and no division by the root of 2
        h = out + (_conv(state, f'{name}.skip', h) if f'{name}.skip.weight' in state else h)
        return h + attend(name, h) if f'{name}.qkv.weight' in state else h

    # no endpoint, cosines first
    angles = noise_labels.double().numpy()[:, None] * 10000.0 ** (-np.arange(c // 2) / (c // 2))
    emb = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    emb = _linear(state, 'map_layer1', _silu(_linear(state, 'map_layer0', emb)))
    # the class joins after the layers
    emb = _silu(emb + _linear(state, 'map_label', onehot.double().numpy()))
    assert attention == [4] and r == 8
    skips = [_conv(state, 'enc.8x8_conv', x)]
    for name, mode in (('8x8_block0', None), ('4x4_down', 'down'), ('4x4_block0', None)):
        skips.append(block(f'enc.{name}', skips[-1], mode))
    h = block('dec.4x4_in1', block('dec.4x4_in0', skips[-1]))
    for r in (4, 8):
        if r == 8:
            h = block('dec.8x8_up', h, 'up')
        for i in range(2):
            h = block(f'dec.{r}x{r}_block{i}', np.concatenate([h, skips.pop()], axis=1))
    assert not skips
    return torch.from_numpy(_conv(state, 'out_conv', _silu(norm('out_norm', h))))


def inputs():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=g, dtype=torch.float64)
    noise = torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64).log() / 4
    # the last means "no class"
    labels = torch.tensor([0, 4, 5])
    onehot = torch.eye(6, dtype=torch.float64)[labels][:, :5]
    return x, noise, labels, onehot


def test_state_dict_of_the_published_network():
    with torch.device('meta'):
        network = ADMUNet(**PUBLISHED)
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == shapes(**PUBLISHED)
    # the 296 M of Dhariwal & Nichol
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 296


def test_forward_is_the_reference():
    state = random_state()
    network = ADMUNet(**TINY).eval()
    network.load_state_dict(state, strict=True)
    x, noise, labels, onehot = inputs()
    expected = reference(state, x, noise, onehot)
    assert 0.1 < expected.std() < 10
    with torch.no_grad():
        found = network.double()(x, noise, labels)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_published_file_becomes_a_teacher(edm_file, capsys):
    """Out of EDM's pickle, through the tool, into the velocity network around it."""
    state = random_state()
    name = edm_file(state, TINY, inner='DhariwalUNet')
    found, config = read_edm_pickle(name)
    assert config == dict(unet=dict(type='ADMUNet', **TINY), sigma_data=0.5)
    assert found.keys() == state.keys()
    convert([name, 'adm.safetensors'])
    assert "unet=dict(type='ADMUNet'" in capsys.readouterr().out
    network = load_network(EDMVelocity(**config), 'adm.safetensors', into='unet').eval().double()
    x, _, labels, onehot = inputs()
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    with torch.no_grad():
        v = network(x, t, labels)
    # the denoiser of EDM's Table 1 at x_t / (1 - t), and the velocity from it
    t = t[:, None, None, None]
    sigma = t / (1 - t)
    noisy = x / (1 - t)
    total = sigma**2 + 0.25
    prediction = reference(state, noisy / total.sqrt(), sigma.flatten().log() / 4, onehot)
    denoised = 0.25 / total * noisy + sigma * 0.5 / total.sqrt() * prediction
    torch.testing.assert_close(v, (x - denoised) / t, rtol=1e-9, atol=1e-9)


def test_bad_settings():
    with pytest.raises(UsageError, match='heads of 64 channels, of which 96'):
        ADMUNet(**{**TINY, 'channel_mult': [2, 3]})
    with pytest.raises(UsageError, match='ADMUNet with 2 levels needs an img_resolution'):
        ADMUNet(**{**TINY, 'img_resolution': 7})
    x, noise, _, _ = inputs()
    with pytest.raises(ValueError, match='a network of 5 classes was called with labels=None'):
        ADMUNet(**TINY).double()(x, noise)
