# Copyright (c) mmfgm authors.
"""Consistency Flow Matching against its authors' formula, and where it must vanish."""

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn

from mmfgm.errors import UsageError
from mmfgm.flow import LinearPath, PathSample, expand_t
from mmfgm.models import ConsistencyFM, VelocityConsistencyLoss
from mmfgm.registry import MODELS
from tests.conftest import NETWORK

EXACT = dict(rtol=1e-9, atol=1e-12)
UNIFORM = dict(type='Uniform')


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        yield


class RandomVelocity(nn.Module):
    """A smooth random ``v(x, t)`` in float64."""

    event_shape = (3, 4, 4)

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1)
        ).double()

    def forward(self, x, t):
        return self.layers(torch.cat([x, expand_t(t, x).expand_as(x[:, :1])], dim=1))


def authors(network, average, data, noise, s, segments, delta, boundary, alpha):
    """The loss as the authors have it: time s from noise to data, velocity ``w = -v``."""

    def velocity(of, x, s):
        return -of(x, 1 - s)

    def wide(s):
        return s.view(-1, 1, 1, 1)

    def line(s):
        return wide(s) * data + (1 - wide(s)) * noise

    def mean(x):
        return x.square().flatten(1).mean(1)

    later = (s + delta).clamp(max=1)
    borders = torch.linspace(0, 1, segments + 1, dtype=s.dtype)
    end = borders[torch.searchsorted(borders, s, side='left').clamp(min=1)]
    w = velocity(network, line(s), s)
    w_later = velocity(average, line(later), later).detach()
    f = line(s) + wide(end - s) * w
    below = wide((later < boundary).double())
    f_later = below * (line(later) + wide(end - later) * w_later) + (1 - below) * line(end)
    counts = (s < boundary) & (end - s > 1.01 * delta)
    return mean(f - f_later) + alpha * counts * mean(w - w_later)


@pytest.mark.parametrize(
    'segments, delta, boundary, alpha',
    [(2, 1e-3, 0.9, 1e-5), (4, 0.05, 0.7, 0.3), (1, 0.1, 1, 1.0)],
)
def test_is_the_authors_loss(segments, delta, boundary, alpha):
    network, average = RandomVelocity(0), RandomVelocity(1)
    g = torch.Generator().manual_seed(2)
    data, noise = torch.randn(2, 64, 3, 4, 4, generator=g, dtype=torch.float64)
    s = torch.rand(64, generator=g, dtype=torch.float64)
    # the last times: r is where the data are
    s[:2] = torch.tensor([0.9999, 0.98])
    expected = authors(network, average, data, noise, s, segments, delta, boundary, alpha)
    loss = VelocityConsistencyLoss(segments, delta, 1 - boundary, alpha)
    path = LinearPath.sample(data, 1 - s, noise)
    r = loss.earlier(path.t)
    u = average(LinearPath.interpolate(data, noise, r), r)
    found = loss.terms(u, network(path.x_t, path.t), path)
    torch.testing.assert_close(found, expected, **EXACT)
    weights = list(network.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found.mean(), weights), torch.autograd.grad(expected.mean(), weights)
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_without_a_target_it_is_flow_matching_weighted_by_the_way_to_go():
    """The authors' ``boundary=0``; the same as a boundary of 1 with any target."""
    g = torch.Generator().manual_seed(0)
    x_0, eps, v, u = torch.randn(4, 32, 3, generator=g, dtype=torch.float64)
    t = torch.rand(32, generator=g, dtype=torch.float64)
    path = LinearPath.sample(x_0, t, eps)
    loss = VelocityConsistencyLoss(segments=2, boundary=1.0, alpha=0.0)
    to_go = t - (t > 0.5) * 0.5
    expected = to_go**2 * (v - (eps - x_0)).square().mean(1)
    torch.testing.assert_close(loss.terms(None, v, path), expected, **EXACT)
    torch.testing.assert_close(loss.terms(u, v, path), expected, **EXACT)


def test_ends_of_segments():
    loss = VelocityConsistencyLoss(segments=4)
    t = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.99, 1.0])
    assert loss.segment_end(t).tolist() == [0, 0, 0.25, 0.25, 0.75, 0.75]
    assert loss.earlier(torch.tensor([0.0, 0.0005, 1.0])).tolist() == pytest.approx([0, 0, 0.999])


class Straight(nn.Module):
    """The velocity of the coupling ``x_0 = mean + scale eps``, whose paths are straight; with scale
    1 it is constant."""

    event_shape = (2,)
    num_classes = 0

    def __init__(self, scale, wrong=0.0):
        super().__init__()
        self.scale = scale
        self.register_buffer('mean', torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.wrong = nn.Parameter(torch.tensor(wrong, dtype=torch.float64))

    def forward(self, x_t, t):
        t = t[:, None].double()
        eps = (x_t - (1 - t) * self.mean) / ((1 - t) * self.scale + t)
        return (1 + self.wrong * t) * (eps - (self.mean + self.scale * eps))


MODELS.register_module(module=Straight, name='StraightVelocity')


@pytest.mark.parametrize('scale', [1.0, 0.3])
@pytest.mark.parametrize('segments', [1, 2, 5])
def test_vanishes_on_a_straight_flow(scale, segments):
    def loss_of(wrong):
        model = ConsistencyFM(
            dict(type='StraightVelocity', scale=scale, wrong=wrong),
            UNIFORM,
            loss=dict(type='VelocityConsistencyLoss', segments=segments, delta=0.01, alpha=1.0),
        )
        torch.manual_seed(0)
        eps = torch.randn(256, 2, dtype=torch.float64)
        x_0 = model.network.mean + scale * eps
        return model.loss('network', dict(x_0=x_0, eps=eps, cond={}))['loss_consistency']

    # times are float32, so x_t is rounded
    assert loss_of(0.0) < 1e-12
    assert loss_of(1.0) > 1e-5


def model(**kwargs):
    torch.manual_seed(0)
    made = ConsistencyFM(NETWORK, UNIFORM, **kwargs)
    for p in made.network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return made


def loss_of(made):
    torch.manual_seed(1)
    idx = torch.arange(16)
    return made.loss('network', dict(x_0=torch.randn(16, 1, 8, 8), cond=dict(labels=idx % 10)))


def test_the_target_is_the_average_and_has_no_gradient():
    made = model()
    before = loss_of(made)['loss_consistency']
    # trainable, so that a gradient could reach it
    made.network_ema.requires_grad_(True)
    loss_of(made)['loss_consistency'].backward()
    assert all(p.grad is None for p in made.network_ema.parameters())
    assert any(p.grad.abs().sum() > 0 for p in made.network.parameters())
    made.network_ema.load_state_dict(made.network.state_dict())
    after = loss_of(made)['loss_consistency']
    assert after != before
    # the authors' code: the network itself, without gradient
    itself = model(target='network')
    torch.testing.assert_close(loss_of(itself)['loss_consistency'], after)


def test_before_its_start_no_target_is_called():
    made = model(start=5)
    calls = []
    made.network_ema.register_forward_hook(lambda *args: calls.append(1))
    made.iteration = 4
    early = loss_of(made)['loss_consistency']
    assert not calls
    made.iteration = 5
    assert loss_of(made)['loss_consistency'] != early and calls == [1]


def test_wrong_settings_are_named():
    with pytest.raises(UsageError, match="model.target must be one of .*'network_ema_2'.*add"):
        ConsistencyFM(NETWORK, UNIFORM, target='network_ema_2')
    for wrong in (dict(segments=0), dict(delta=0.0), dict(boundary=1.1), dict(alpha=-1.0)):
        with pytest.raises(ValueError, match='needs segments >= 1'):
            VelocityConsistencyLoss(**wrong)


def test_a_path_is_all_the_loss_needs():
    """It takes what every loss takes, ``(u, v, path)``."""
    ones = torch.ones(2, 3)
    path = PathSample(x_0=ones, eps=ones, t=torch.ones(2), x_t=ones, velocity=0 * ones)
    assert set(VelocityConsistencyLoss()(None, 0 * ones, path)) == {'loss_consistency'}
