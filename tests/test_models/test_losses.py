# Copyright (c) mmfgm authors.
"""Every loss against its authors' formula in their own parameterisation, in float64."""

import pytest
import torch
from torch import nn

from mmfgm.flow import LinearPath, PathSample, PowerWeight, SiDWeight, expand_t, weight_named
from mmfgm.models.losses import (
    DiffInstructLoss,
    DMDLoss,
    FGMLoss,
    FlowMatchingLoss,
    RealUIDLoss,
    RealUIDOnlineLoss,
    fgm_terms,
)
from tests.gaussians import hermite, implicit_velocity, legendre

ONES = torch.ones(1, 1)
EXACT = dict(rtol=1e-9, atol=1e-12)


@pytest.fixture
def velocities():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3)]


def path_of(velocity):
    """Most losses take the velocity of a path sample alone."""
    return PathSample(x_0=None, eps=None, t=None, x_t=None, velocity=velocity)


def mean_sq(x):
    return x.flatten(1).square().mean(1)


class Denoiser(nn.Module):
    """A random network in EDM's parameterisation: ``D(x, sigma)``."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1)
        ).double()

    def forward(self, x, sigma):
        sigma = expand_t(sigma, x)
        return x / (1 + sigma**2) + self.layers(x / (0.25 + sigma**2).sqrt() + sigma.log() / 4)

    def velocity(self, x_t, t):
        """The same network in ours: ``x_t = x / (1 + sigma)``, ``t = sigma / (1 + sigma)``."""
        sigma = t / (1 - t)
        denoised = self(x_t * expand_t(1 + sigma, x_t), sigma)
        return (x_t - denoised) / expand_t(t, x_t)


@pytest.fixture
def world():
    """Two denoisers, samples that want a gradient, noise levels and noise."""
    g = torch.Generator().manual_seed(1)
    x_0 = torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64).requires_grad_(True)
    n = torch.randn(x_0.shape, generator=g, dtype=torch.float64)
    sigma = torch.rand(6, generator=g, dtype=torch.float64) * 5 + 0.05
    return Denoiser(0), Denoiser(1), x_0, n, sigma


def ours(loss, world):
    """Value of each sample and gradient on ``x_0`` of the mean, through the code of training."""
    real, fake, x_0, n, sigma = world
    t = sigma / (1 + sigma)
    path = LinearPath.sample(x_0, t, n)
    with torch.set_grad_enabled(loss.through_networks):
        u, v = real.velocity(path.x_t, t), fake.velocity(path.x_t, t)
    terms = loss.terms(u, v, path)
    (grad,) = torch.autograd.grad(terms.mean(), x_0)
    return terms, grad


def test_terms_are_means_and_have_the_identity(velocities):
    u, v, target = velocities
    l_1, l_2 = fgm_terms(u, v, path_of(target))
    assert l_1.shape == l_2.shape == (5,)
    torch.testing.assert_close(l_1, mean_sq(u - v))
    torch.testing.assert_close(l_1 + l_2, mean_sq(u - target) - mean_sq(v - target))


@pytest.mark.parametrize('alpha, l1_weight', [(0.5, 1.0), (1.0, 0.0), (1.2, -0.4)])
def test_l1_weight_is_sid_alpha(velocities, alpha, l1_weight):
    """SiD's loss (1 - alpha) ||d||^2 + d^T (v - c), up to its factor 2."""
    u, v, target = velocities
    sid = (1 - alpha) * mean_sq(u - v) + ((u - v) * (v - target)).flatten(1).mean(1)
    out = FGMLoss(l1_weight=l1_weight)(u, v, path_of(target))
    torch.testing.assert_close(out['loss_fgm'], 2 * sid.mean())


def test_gradient_vanishes_where_flows_agree(velocities):
    """At u = v, L_2 still pulls through x_0 only in expectation; L_1 has no gradient at all."""
    u, _, target = velocities
    v = u.clone().requires_grad_(True)
    l_1, _ = fgm_terms(u, v, path_of(target))
    (grad,) = torch.autograd.grad(l_1.sum(), v)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_flow_matching_loss(velocities):
    v, target, _ = velocities
    loss = FlowMatchingLoss()
    torch.testing.assert_close(loss.terms(None, v, path_of(target)), mean_sq(v - target))
    assert loss(None, v, path_of(target))['loss_fm'] == mean_sq(v - target).mean()


@pytest.mark.parametrize('alpha', [0.5, 1.0, 1.2])
def test_sid(world, alpha):
    """SiD as its authors write it, for denoisers at noise levels sigma."""
    real, fake, x_0, n, sigma = world
    x = x_0 + expand_t(sigma, x_0) * n
    y_real, y_fake = real(x, sigma), fake(x, sigma)
    with torch.no_grad():
        factor = (x_0 - y_real).abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
    loss = (y_real - y_fake) * ((y_real - x_0) - alpha * (y_real - y_fake)) / factor
    terms = loss.flatten(1).mean(1)
    (grad,) = torch.autograd.grad(terms.mean(), x_0)
    found = ours(FGMLoss(l1_weight=2 - 2 * alpha, weight='sid'), world)
    torch.testing.assert_close(found, (terms, grad), **EXACT)


def test_sid_dit(world):
    """``t^2 (1 - t)`` on SiD's loss of velocities."""
    real, fake, x_0, n, sigma = world
    t = sigma / (1 + sigma)
    path = LinearPath.sample(x_0, t, n)
    u, v = real.velocity(path.x_t, t), fake.velocity(path.x_t, t)
    inside = (u - v) * ((v - path.velocity) + (1 - 1.2) * (u - v))
    terms = 2 * t**2 * (1 - t) * inside.flatten(1).mean(1)
    (grad,) = torch.autograd.grad(terms.mean(), x_0)
    found = ours(FGMLoss(l1_weight=-0.4, weight='sid_dit'), world)
    torch.testing.assert_close(found, (terms, grad), **EXACT)


def test_dmd(world):
    """DMD2's normalised difference of denoisers, as a half squared distance to a fixed target."""
    real, fake, x_0, n, sigma = world
    x = x_0 + expand_t(sigma, x_0) * n
    with torch.no_grad():
        p_real, p_fake = x_0 - real(x, sigma), x_0 - fake(x, sigma)
        direction = (p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True)
    loss = 0.5 * (x_0 - (x_0 - direction).detach()).square().flatten(1).mean(1).mean()
    (grad,) = torch.autograd.grad(loss, x_0)
    torch.testing.assert_close(ours(DMDLoss(), world)[1], grad, **EXACT)


def gaussian_kl(mean, variance, other_mean, other_variance):
    ratio = variance / other_variance
    return (ratio - 1 - ratio.log() + (mean - other_mean) ** 2 / other_variance) / 2


@pytest.mark.parametrize('weight', [None, dict(t=1.0), dict(t=2.0, one_minus_t=1.0)])
def test_diff_instruct_is_the_integral_kl(weight):
    """The generator a z + b against the teacher of N(-0.5, 1.3^2): the gradient over (a, b)."""
    a, b, teacher = 0.6, 0.4, (1.3, -0.5)
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (a, b)]
    t, w_t = legendre(40)
    w = weight_named(weight)(t, PathSample(None, None, t, None, None))
    marginals = [((1 - t) * m, (1 - t) ** 2 * s**2 + t**2) for s, m in (leaves, teacher)]
    kl = (w_t * w * gaussian_kl(*marginals[0], *marginals[1])).sum()
    reference = torch.stack(torch.autograd.grad(kl, leaves))

    (z, w_z), (eps, w_eps) = hermite(8), hermite(8)
    z, eps, t = (x.reshape(-1, 1) for x in torch.meshgrid(z, eps, t, indexing='ij'))
    weights = (w_z[:, None, None] * w_eps[:, None] * w_t).reshape(-1)
    path = LinearPath.sample(leaves[0] * z + leaves[1], t[:, 0], eps)
    u = implicit_velocity(path.x_t, t, *teacher)
    v = implicit_velocity(path.x_t, t, a, b)
    terms = DiffInstructLoss(weight).terms(u, v, path)
    gradient = torch.stack(torch.autograd.grad((weights * terms).sum(), leaves))
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=0)


@pytest.mark.parametrize('alpha, beta', [(0.94, 0.92), (0.9, 0.918), (1.0, 0.98), (1.0, 1.0)])
def test_realuid_generator(world, alpha, beta):
    real, fake, x_0, n, sigma = world
    t = sigma / (1 + sigma)
    path = LinearPath.sample(x_0, t, n)
    u, v = real.velocity(path.x_t, t), fake.velocity(path.x_t, t)
    c = beta / alpha * path.velocity
    terms = alpha * mean_sq(u - c) - alpha * mean_sq(v - c)
    (grad,) = torch.autograd.grad(terms.mean(), x_0)
    torch.testing.assert_close(ours(RealUIDLoss(alpha, beta), world), (terms, grad), **EXACT)
    if alpha == beta == 1:
        torch.testing.assert_close(ours(FGMLoss(), world), (terms, grad), **EXACT)


def test_realuid_online_learns_the_mixture(world):
    """Where real and generated data are the same point, the best velocity is its own: the two
    targets, weighted, add up to ``c``."""
    _, _, x_0, n, sigma = world
    path = LinearPath.sample(x_0.detach(), sigma / (1 + sigma), n)
    loss = RealUIDOnlineLoss(0.94, 0.92)
    assert loss.needs_real and not RealUIDOnlineLoss().needs_real
    v = path.velocity.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(loss.terms(None, v, path, v, path).sum(), v)
    assert grad.abs().max() < 1e-12
    # and by the formula, where they differ
    v_real, other = v.detach() * 2 - 1, LinearPath.sample(1 - x_0.detach(), path.t, n)
    terms = 0.94 * mean_sq(v - 0.92 / 0.94 * path.velocity)
    terms = terms + 0.06 * mean_sq(v_real - 0.08 / 0.06 * other.velocity)
    torch.testing.assert_close(loss.terms(None, v, path, v_real, other), terms, **EXACT)
    alone = RealUIDOnlineLoss().terms(None, v, path)
    torch.testing.assert_close(alone, FlowMatchingLoss().terms(None, v, path), **EXACT)


@pytest.mark.parametrize(
    'make, match',
    [
        (lambda: FGMLoss(weight='sidd'), "there is no weight 'sidd'; use one of"),
        (lambda: FGMLoss(weight=dict(sigma=1)), 'powers of t and of 1 - t'),
        (lambda: RealUIDLoss(0, 1), '0 < alpha <= 1'),
        (lambda: RealUIDLoss(1, 0), 'beta > 0'),
        (lambda: RealUIDOnlineLoss(1, 0.98), 'use alpha below 1'),
        (lambda: RealUIDOnlineLoss(0.9, 0.9).terms(None, ONES, path_of(ONES)), 'pass v_real'),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_powers(velocities):
    u, v, target = velocities
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    path = PathSample(None, None, t, None, target)
    plain = FGMLoss(0.0).terms(u, v, path)
    weighted = FGMLoss(0.0, weight=dict(t=0.5, one_minus_t=2.0)).terms(u, v, path)
    torch.testing.assert_close(weighted, plain * t**0.5 * (1 - t) ** 2)
    assert PowerWeight(t=-1.0).order_at_0 < 0 < SiDWeight().order_at_0
    assert DiffInstructLoss().order_at_0 == -1
    assert DiffInstructLoss(dict(t=1.0)).order_at_0 == 0
