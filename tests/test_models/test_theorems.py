# Copyright (c) mmfgm authors.
"""Theorems 4.1 and 4.2, in float64 on Gaussians, through the code that training uses."""

from dataclasses import replace

import pytest
import torch

from mmfgm.flow import LinearPath, PathSample, Uniform
from mmfgm.models import FGM, fgm_terms
from mmfgm.registry import MODELS
from tests.gaussians import (
    AffineGenerator,
    GaussianVelocity,
    hermite,
    implicit_velocity,
    legendre,
    true_distance,
)

A, B, TEACHER = 0.6, 0.4, (1.3, -0.5)


@pytest.mark.parametrize('f', [lambda x: x**3 - 2 * x + 1, torch.tanh, lambda x: torch.cos(2 * x)])
@pytest.mark.parametrize('t', [0.1, 0.5, 0.9])
def test_flow_product_identity(f, t):
    """Theorem 4.1 (Eq. 4.7): E f(x_t) v_theta(x_t) = E f(x_t) u_t(x_t | x_0)."""
    nodes, weights = hermite(80)
    variance = (1 - t) ** 2 * A**2 + t**2
    x = (1 - t) * B + variance**0.5 * nodes
    left = (weights * f(x) * implicit_velocity(x, t, A, B)).sum()
    z, eps = torch.meshgrid(nodes, nodes, indexing='ij')
    x_0 = A * z + B
    x_t = (1 - t) * x_0 + t * eps
    right = (weights[:, None] * weights * f(x_t) * LinearPath.velocity(x_0, eps)).sum()
    assert abs(left - right) < 1e-9 * abs(right)


def parameters():
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B)]


def tractable_gradients(stop=None):
    """Autograd gradients of L_1 (4.11) and L_2 (4.12) over (a, b), by exact quadrature.

    ``stop`` moves one stop-gradient: it detaches a branch that must carry the gradient, or lets
    theta into v.
    """
    a, b = parameters()
    (z, w_z), (eps, w_eps), (t, w_t) = hermite(6), hermite(6), legendre(32)
    z, eps, t = (x.reshape(-1, 1) for x in torch.meshgrid(z, eps, t, indexing='ij'))
    weights = (w_z[:, None, None] * w_eps[:, None] * w_t).reshape(-1)
    x_0 = a * z + b
    path = LinearPath.sample(x_0, t[:, 0], eps)
    x_for_u = path.x_t.detach() if stop == 'x_t into u' else path.x_t
    x_for_v = path.x_t.detach() if stop == 'x_t into v' else path.x_t
    target = path.velocity.detach() if stop == 'target' else path.velocity
    theta = (a, b) if stop == 'theta into v' else (a.detach(), b.detach())
    u = implicit_velocity(x_for_u, t, *TEACHER)
    v_sg = implicit_velocity(x_for_v, t, *theta)
    return [
        torch.stack(
            torch.autograd.grad(
                (weights * term).sum(),
                (a, b),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        for term in fgm_terms(u, v_sg, replace(path, velocity=target))
    ]


def true_gradient():
    """Of Eq. 4.1, in closed form."""
    a, b = parameters()
    return torch.stack(torch.autograd.grad(true_distance(a, b, TEACHER, *legendre(32)), (a, b)))


def grad_2():
    """Eq. 4.5, ``E -2 (u - v)^T dv/dtheta``, with the theta-gradient of v that training cannot
    have."""
    a, b = parameters()
    (n, w_n), (t, w_t) = hermite(6), legendre(32)
    n, t = torch.meshgrid(n, t, indexing='ij')
    x = ((1 - t) * b + ((1 - t) ** 2 * a**2 + t**2).sqrt() * n).detach()
    v = implicit_velocity(x, t, a, b)
    u = implicit_velocity(x, t, *TEACHER)
    return torch.stack(
        torch.autograd.grad((w_n[:, None] * w_t * -2 * (u - v).detach() * v).sum(), (a, b))
    )


def relative_error(gradient, reference):
    return ((gradient - reference).norm() / reference.norm()).item()


def test_gradient_equals_that_of_the_intractable_distance():
    """The gradient of L_1 + L_2 (4.10) is that of E ||u - v_theta||^2 (4.1)."""
    assert relative_error(sum(tractable_gradients()), true_gradient()) < 1e-6


def test_each_term_has_its_part_of_the_gradient():
    """Theorem 4.2: L_2 has the gradient Grad_2 (4.5); L_1 has the rest, Grad_1 (4.4)."""
    l_1, l_2 = tractable_gradients()
    assert relative_error(l_2, grad_2()) < 1e-6
    assert relative_error(l_1, true_gradient() - grad_2()) < 1e-6


@pytest.mark.parametrize('stop', ['x_t into u', 'x_t into v', 'target', 'theta into v'])
def test_a_moved_stop_gradient_breaks_theorem_4_2(stop):
    assert relative_error(tractable_gradients(stop)[1], grad_2()) > 1e-2


@pytest.mark.parametrize('stop', ['x_t into u', 'x_t into v', 'theta into v'])
def test_a_moved_stop_gradient_breaks_grad_1(stop):
    assert relative_error(tractable_gradients(stop)[0], true_gradient() - grad_2()) > 1e-2


@pytest.mark.parametrize('stop', ['x_t into u', 'x_t into v', 'target'])
def test_a_moved_stop_gradient_breaks_the_sum(stop):
    """Theta into v is missing here: at the exact v, its two contributions cancel."""
    assert relative_error(sum(tractable_gradients(stop)), true_gradient()) > 1e-2


@pytest.fixture
def gaussian_fgm():
    MODELS.register_module(name='GaussianVelocity', module=GaussianVelocity, force=True)
    model = FGM(
        network=dict(type='GaussianVelocity', a=TEACHER[0], b=TEACHER[1]),
        teacher=dict(checkpoint=None),
        fm_time_sampler=dict(type='Uniform', low=0.05, high=0.95),
        fgm_time_sampler=dict(type='Uniform', low=0.05, high=0.95),
    )
    model.generator = AffineGenerator(A, B)
    model.online = GaussianVelocity(A, B)  # the optimum of the online phase
    return model


def test_the_model_follows_the_true_gradient(gaussian_fgm):
    """The same through FGM.prepare and FGM.loss, by sampling."""
    torch.manual_seed(0)
    gaussian_fgm.online.requires_grad_(False)  # as the loop does
    gradient = torch.zeros(2, dtype=torch.float64)
    for _ in range(16):
        samples = gaussian_fgm.prepare(dict(idx=torch.arange(2**19)), differentiable=True)
        loss = gaussian_fgm.loss('generator', samples)['loss_fgm']
        gradient += (
            torch.stack(
                torch.autograd.grad(loss, (gaussian_fgm.generator.a, gaussian_fgm.generator.b))
            )
            / 16
        )
    assert relative_error(gradient, true_gradient()) < 1e-2


def test_the_online_phase_learns_the_implicit_velocity(gaussian_fgm):
    """L_FM(psi) is stationary at the implicit velocity of the generator, and only its parameters
    get gradients."""
    torch.manual_seed(0)
    model = gaussian_fgm
    samples = model.prepare(dict(idx=torch.arange(2**20)), differentiable=False)
    at_optimum = torch.autograd.grad(
        model.loss('online', samples)['loss_fm'], model.online.parameters()
    )
    model.online = GaussianVelocity(A + 0.2, B - 0.2)
    elsewhere = torch.autograd.grad(
        model.loss('online', samples)['loss_fm'], model.online.parameters()
    )
    assert all(abs(x) < 0.05 * abs(y) for x, y in zip(at_optimum, elsewhere))
    assert not samples['x_0'].requires_grad


def test_time_sampler_of_each_loss_is_its_own(gaussian_fgm):
    gaussian_fgm.fm_time_sampler, gaussian_fgm.fgm_time_sampler = (
        Uniform(0.1, 0.1),
        Uniform(0.9, 0.9),
    )
    seen = []
    gaussian_fgm.online.register_forward_hook(
        lambda module, args, out: seen.append(args[1].unique().tolist())
    )
    samples = gaussian_fgm.prepare(dict(idx=torch.arange(4)), differentiable=True)
    for phase in gaussian_fgm.phases:
        gaussian_fgm.loss(phase, samples)
    assert seen == [[pytest.approx(0.1)], [pytest.approx(0.9)]]


def gradient_of_cycles(order, seed=0, cycles=20000, n=4):
    """Mean and standard error of the gradient of L_2 over (a, b), each cycle with an online network
    of its own, ``v = k x_t + m``, that takes one step of gradient descent."""
    g = torch.Generator().manual_seed(seed)

    def draw(a, b):
        z, eps = (torch.randn(cycles, n, generator=g, dtype=torch.float64) for _ in range(2))
        t = 0.1 + 0.8 * torch.rand(cycles, n, generator=g, dtype=torch.float64)
        x_0 = a * z + b
        x_t = (1 - t) * x_0 + t * eps
        return PathSample(x_0, eps, t, x_t, eps - x_0)

    def online_update(path):
        error = k * path.x_t.detach() + m - path.velocity.detach()
        k.sub_(0.3 * (error * path.x_t.detach()).mean(1, keepdim=True))
        m.sub_(0.3 * error.mean(1, keepdim=True))

    def noised_again(path):
        eps = torch.randn(cycles, n, generator=g, dtype=torch.float64)
        x_t = (1 - path.t) * path.x_0 + path.t * eps
        return PathSample(path.x_0, eps, path.t, x_t, eps - path.x_0)

    k, m = (torch.full((cycles, 1), value, dtype=torch.float64) for value in (0.2, -0.3))
    a, b = (torch.full((cycles, 1), x, dtype=torch.float64, requires_grad=True) for x in (A, B))
    # a cycle before, so that the online network is a random one in every order
    online_update(draw(A, B))
    path = draw(a, b)
    if order == 'online first':
        online_update(path)
        path = noised_again(path)  # each phase draws its own noise, for the same x_0
    elif order == 'fresh':
        online_update(draw(A, B))
    u = implicit_velocity(path.x_t, path.t, *TEACHER)
    _, l_2 = fgm_terms(u, k * path.x_t + m, path)
    gradient = torch.cat(torch.autograd.grad(l_2.sum(), (a, b)), dim=1)
    return gradient.mean(0), gradient.std(0) / cycles**0.5


def test_shared_samples_are_unbiased_only_if_the_generator_comes_first():
    """An online network that was just fitted to the samples gives them another gradient than fresh
    ones; taken before, in DMD2's order (held for the loop in test_loop.py), it is theirs."""
    fresh, error = gradient_of_cycles('fresh', seed=1)
    shared, shared_error = gradient_of_cycles('online first')
    assert ((shared - fresh).abs() > 10 * (error + shared_error)).any()
    # the gradient comes before the update on its samples: only another draw
    fresh, error = gradient_of_cycles('generator first', seed=1)
    shared, shared_error = gradient_of_cycles('generator first')
    assert ((shared - fresh).abs() < 4 * (error**2 + shared_error**2).sqrt()).all()
