# Copyright (c) mmfgm authors.
"""EDM's U-Net and its velocity, held against a reference written without sight of them and against
closed forms."""

import hashlib
import math
import re

import pytest
import torch
from torch import nn

from mmfgm.models.networks import EDMUNet, EDMVelocity
from tests.edm_reference import edm_denoiser, edm_unet, random_state_dict, state_shapes

CIFAR10 = dict(model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,))
# (resolution, in channels, out channels, classes, augmentation labels), architecture
SMALL = {
    'labels': (
        (16, 3, 3, 5, 9),
        dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,)),
    ),
    'plain': (
        (32, 3, 3, 0, 0),
        dict(model_channels=16, channel_mult=(2, 2, 2), num_blocks=1, attn_resolutions=(16,)),
    ),
    'no-attention': (
        (8, 1, 1, 10, 0),
        dict(model_channels=32, channel_mult=(1, 2), num_blocks=2, attn_resolutions=()),
    ),
    'odd': (
        (8, 1, 2, 0, 4),
        dict(model_channels=16, channel_mult=(2, 1, 3), num_blocks=2, attn_resolutions=(8, 4, 2)),
    ),
    'one-level': (
        (8, 3, 3, 3, 0),
        dict(model_channels=32, channel_mult=(2,), num_blocks=1, attn_resolutions=(8,)),
    ),
    # more than 128 channels: 32 groups, not a quarter of the channels
    'wide': (
        (8, 3, 3, 0, 0),
        dict(model_channels=96, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)),
    ),
}
TIMES = [0.0, 1e-3, 0.5, 0.999, 1.0]


def build(dims, architecture, state=None):
    net = EDMUNet(*dims[:3], label_dim=dims[3], augment_dim=dims[4], **architecture).eval()
    if state is not None:
        net = net.double()
        net.load_state_dict(state, strict=True)
    return net


def inputs(dims, n=3, seed=1):
    """Images, noise labels (sigma 0.002 to 80), class labels (the last: none), their one-hot,
    augmentation labels."""
    resolution, channels, _, label_dim, augment_dim = dims
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, resolution, resolution, generator=g, dtype=torch.float64)
    noise = torch.linspace(math.log(0.002), math.log(80), n, dtype=torch.float64) / 4
    labels = onehot = None
    if label_dim:
        labels = torch.tensor([*range(n - 1), label_dim])
        onehot = torch.eye(label_dim + 1, dtype=torch.float64)[labels][:, :label_dim]
    augment = torch.randn(n, augment_dim, generator=g, dtype=torch.float64) if augment_dim else None
    return x, noise, labels, onehot, augment


def error(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize(
    'label_dim, augment_dim, count',
    [(0, 0, 55732739), (0, 9, 55733891), (10, 0, 55734147), (10, 9, 55735299)],
)
def test_keys_and_shapes(label_dim, augment_dim, count):
    with torch.device('meta'):
        net = build(dims := (32, 3, 3, label_dim, augment_dim), CIFAR10)
    assert sum(p.numel() for p in net.parameters()) == count
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == state_shapes(
        *dims, **CIFAR10
    )
    assert all(k.endswith('resample_filter') for k, _ in net.named_buffers())
    if label_dim and augment_dim:  # the published CIFAR-10 network's list of "key 1x2x3", sorted
        lines = sorted(f'{k} {"x".join(map(str, v.shape))}\n' for k, v in net.state_dict().items())
        assert hashlib.sha256(''.join(lines).encode()).hexdigest()[:16] == 'f0b2da3e199f5afb'


def test_defaults_are_cifar10():
    with torch.device('meta'):
        net = EDMUNet(32, 3, 3)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == state_shapes(
        32, 3, 3, **CIFAR10
    )


def test_resample_filters():
    net = build(*SMALL['plain'])
    buffers = dict(net.named_buffers())
    assert len(buffers) == 8  # conv0 and skip of two downs and two ups
    assert all(torch.equal(b, torch.full((1, 1, 2, 2), 0.25)) for b in buffers.values())


@pytest.mark.parametrize('name', SMALL)
def test_forward(name):
    dims, architecture = SMALL[name]
    state = random_state_dict(*dims, **architecture)
    x, noise, labels, onehot, augment = inputs(dims)
    expected = edm_unet(state, x, noise, onehot, augment, **architecture)
    assert 0.1 < expected.std() < 10
    net = build(dims, architecture, state)
    with torch.no_grad():
        got = net(x, noise, labels, augment)
        assert got.dtype == torch.float64 and got.shape == expected.shape
        assert error(got, expected) < 1e-10
        if augment is not None:  # left out as zeros
            expected_zeros = edm_unet(
                state, x, noise, onehot, torch.zeros_like(augment), **architecture
            )
            assert error(expected_zeros, expected) > 1e-3
            assert error(net(x, noise, labels), expected_zeros) < 1e-10
        net = net.float()
        single = (x.float(), noise.float(), labels, None if augment is None else augment.float())
        got = net(*single)
        assert got.dtype == torch.float32 and error(got, expected) < 1e-4
        with torch.autocast('cpu', torch.bfloat16):
            got = net(*single)
        assert got.isfinite().all() and error(got, expected) < 0.2


def test_forward_cifar10():
    dims = (32, 3, 3, 10, 9)
    state = random_state_dict(*dims, **CIFAR10)
    x, noise, labels, onehot, augment = (v[:1] for v in inputs(dims))
    with torch.no_grad():
        got = build(dims, CIFAR10, state)(x, noise, labels, augment)
    assert error(got, edm_unet(state, x, noise, onehot, augment, **CIFAR10)) < 1e-10


@pytest.mark.parametrize('name', ['labels', 'odd'])
def test_every_parameter_matters(name):
    dims, architecture = SMALL[name]
    net = build(dims, architecture, random_state_dict(*dims, **architecture))
    x, noise, labels, _, augment = (
        v if v is None else v[:2] for v in inputs(dims)
    )  # without the one of no class
    torch.manual_seed(0)
    ignored = []
    with torch.no_grad():
        before = net(x, noise, labels, augment)
        for key, p in net.named_parameters():
            kept = p.clone()
            p.add_(0.1 * torch.randn_like(p))
            if (
                not (net(x, noise, labels, augment) - before).abs().amax(dim=(1, 2, 3)).min() > 1e-5
            ):  # for each image
                ignored.append(key)
            p.copy_(kept)
        assert torch.equal(net(x, noise, labels, augment), before)
    assert ignored == []


def test_initialisation():
    dims, architecture = SMALL['labels']
    torch.manual_seed(0)
    net = build(dims, dict(architecture, model_channels=32))
    for key, p in net.named_parameters():
        module, kind = key.split('.')[-2:]
        if kind == 'bias':
            assert (p == 0).all(), key
        elif p.ndim == 1:
            assert (p == 1).all(), key
        else:  # uniform within +-bound, bound^2 = scale^2 6 / (fan_in + fan_out)
            tiny = module in ('conv1', 'proj') or module.endswith('aux_conv')
            scale = 1e-5 if tiny else math.sqrt(0.2) if module == 'qkv' else 1
            bound = scale * math.sqrt(6 / ((p.shape[0] + p.shape[1]) * p[0, 0].numel()))
            assert 0.95 * bound < p.abs().max() <= bound * (1 + 1e-6), key
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), key
    x, noise, labels, _, augment = inputs(dims)
    out = net(x.float(), noise.float(), labels, augment.float())
    assert 0 < out.abs().max() < 1e-3
    out.sum().backward()
    grads = {k: p.grad for k, p in net.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert grads['dec.16x16_aux_conv.weight'].abs().max() > 1
    assert grads['enc.16x16_conv.weight'].abs().max() > 0


def test_class_labels():
    dims, architecture = SMALL['labels']
    state = random_state_dict(*dims, **architecture)
    net = build(dims, architecture, state)
    x, noise, _, _, augment = inputs(dims)
    with torch.no_grad():
        expected = edm_unet(state, x, noise, torch.zeros(3, 5), augment, **architecture)
        assert error(net(x, noise, torch.full((3,), 5), augment), expected) < 1e-10
        for wrong in (-1, 6):
            with pytest.raises(ValueError, match=re.compile('0.*5', re.DOTALL)):
                net(x, noise, torch.tensor([0, wrong, 1]), augment)
        with pytest.raises(ValueError):
            net(x, noise, None, augment)
        dims, architecture = SMALL['plain']
        x, noise, *_ = inputs(dims)
        with pytest.raises(ValueError):
            build(dims, architecture).double()(x, noise, torch.zeros(3, dtype=torch.int64))


def test_velocity_of_the_unet():
    # v = (x_t - D(x_t / (1 - t), t / (1 - t))) / t
    dims, architecture = SMALL['no-attention']
    state = random_state_dict(*dims, **architecture)
    x, _, labels, onehot, _ = inputs(dims)
    for sigma_data in (0.5, 1.3):
        velocity = EDMVelocity(build(dims, architecture, state), sigma_data=sigma_data).eval()
        t = torch.tensor([0.02, 0.5, 0.97], dtype=torch.float64)
        s = t[:, None, None, None]
        d = edm_denoiser(
            state, x / (1 - s), t / (1 - t), onehot, sigma_data=sigma_data, **architecture
        )
        with torch.no_grad():
            assert error(velocity(x, t, labels), (x - d) / s) < 1e-9


class GaussianUNet(nn.Module):
    """The F of which the preconditioning makes the exact denoiser D of data x_0 ~ N(m, s^2 I).

    With input u = c_in x, that is x = R u for R = sqrt(sigma^2 + d^2), d = sigma_data, and H = s^2
    + sigma^2,
        D         = (s^2 x + sigma^2 m) / H
        c_skip x  = d^2 x / R^2,  c_out = sigma d / R
        D - c_skip x = sigma^2 (s^2 - d^2) x / (H R^2) + sigma^2 m / H      (the terms s^2 d^2 x
        have cancelled) F = (D - c_skip x) / c_out = sigma / (d H) ((s^2 - d^2) u + R m).
    """

    img_resolution, in_channels, out_channels, label_dim = 4, 2, 2, 3

    def __init__(self, mean, std, sigma_data=0.5):
        super().__init__()
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def forward(self, x, noise_labels, labels=None, augment_labels=None):
        assert noise_labels.shape == x.shape[:1] and noise_labels.isfinite().all()
        self.noise_labels, self.labels = noise_labels, labels
        sigma = (4 * noise_labels.double()).clamp(max=700).exp()[:, None, None, None]
        d, s = torch.tensor([self.sigma_data, self.std], dtype=torch.float64)
        h = torch.hypot(sigma, s)
        u_term = (s**2 - d**2) * x.double() * (sigma / h / h)
        return ((u_term + self.mean * (torch.hypot(sigma, d) / h) * (sigma / h)) / d).to(x)


def gaussian_velocity(x_t, t, mean, std):
    # x_t = (1-t) x_0 + t eps has mean (1-t) m and variance V = (1-t)^2 s^2 + t^2; cov(x_0, x_t) =
    # (1-t) s^2, cov(eps, x_t) = t, so that v = E[eps - x_0 | x_t] = (t - (1-t) s^2) / V (x_t -
    # (1-t) m) - m
    x_t, t = x_t.double(), t.double()[:, None, None, None]
    variance = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / variance * (x_t - (1 - t) * mean) - mean


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    'mean, std, sigma_data',
    [(0.0, 0.5, 0.5), (0.7, 0.5, 0.5), (-1.5, 2.0, 0.5), (0.3, 0.05, 0.5), (0.4, 0.6, 1.0)],
)
def test_velocity_of_a_gaussian(dtype, tolerance, mean, std, sigma_data):
    t = torch.tensor(TIMES, dtype=dtype)
    x_t = torch.randn(
        5, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    x_t.requires_grad_()
    unet, labels = GaussianUNet(mean, std, sigma_data), torch.arange(5) % 4
    got = EDMVelocity(unet, sigma_data=sigma_data)(x_t, t, labels)
    assert got.dtype == dtype and unet.labels is labels
    expected = gaussian_velocity(x_t, t, mean, std)
    # the ends of time are evaluated at a finite ln(sigma), where d F is off its limits 0 and m: to
    # the first order by sigma ((1 - d^2 / s^2) x_t / d + d m / s^2) and (s^2 - d^2) x_t / sigma
    ends = (4 * unet.noise_labels[[0, -1]].double() * torch.tensor([1, -1])).exp()
    assert ends.max() < 1e-5
    start = tolerance + ends[0].item() * (sigma_data**-2 + (1 + abs(mean)) / std**2)
    end = tolerance + ends[1].item() * 2 * (std**2 + sigma_data**2)
    for time, bound, a, b in zip(
        TIMES, (start, tolerance, tolerance, tolerance, end), got, expected
    ):
        assert error(a, b) < bound, time  # not so for nan
    assert error(got[0], -x_t[0]) < start and error(got[-1], x_t[-1] - mean) < end
    middle = torch.logit(t[1:-1].double()) / 4  # c_noise = ln(sigma) / 4, sigma = t / (1 - t)
    assert torch.allclose(unet.noise_labels[1:-1].double(), middle, atol=1e-5)
    slope = torch.autograd.grad(got.sum(), x_t)[
        0
    ]  # dv/dx_t = (t - (1-t) s^2) / V, at the ends -1 and 1
    assert slope.isfinite().all()
    assert error(slope[0], -torch.ones(2, 4, 4)) < start
    assert error(slope[-1], torch.ones(2, 4, 4)) < end
