# Copyright (c) mmfgm authors.
import pytest
import torch

from mmfgm.flow import LinearPath, expand_t


@pytest.fixture
def sample():
    g = torch.Generator().manual_seed(0)
    x_0 = torch.randn(16, 3, 4, 4, generator=g, dtype=torch.float64)
    eps = torch.randn(16, 3, 4, 4, generator=g, dtype=torch.float64)
    return x_0, eps


def test_ends_of_the_path(sample):
    x_0, eps = sample
    assert torch.equal(LinearPath.interpolate(x_0, eps, torch.zeros(16)), x_0)
    assert torch.equal(LinearPath.interpolate(x_0, eps, torch.ones(16)), eps)


def test_velocity_is_the_time_derivative(sample):
    x_0, eps = sample
    t = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    path = LinearPath()
    slope = (path.interpolate(x_0, eps, t + 1e-3) - path.interpolate(x_0, eps, t - 1e-3)) / 2e-3
    torch.testing.assert_close(slope, path.velocity(x_0, eps), rtol=1e-10, atol=1e-10)


def test_conversions_are_round_trips(sample):
    x_0, eps = sample
    t = torch.linspace(0.05, 1, 16, dtype=torch.float64)
    x_t, v = LinearPath.interpolate(x_0, eps, t), LinearPath.velocity(x_0, eps)
    torch.testing.assert_close(LinearPath.x_0_from_velocity(x_t, v, t), x_0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(LinearPath.eps_from_velocity(x_t, v, t), eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(LinearPath.velocity_from_x_0(x_t, x_0, t), v, rtol=1e-11, atol=1e-11)


def test_sample_is_consistent_and_differentiable_in_x_0(sample):
    x_0, eps = sample
    x_0.requires_grad_(True)
    t = torch.full((16,), 0.25)
    path = LinearPath.sample(x_0, t, eps)
    torch.testing.assert_close(path.x_t, 0.75 * x_0 + 0.25 * eps)
    # d x_t / d x_0 = 1 - t and d velocity / d x_0 = -1: both branches carry the generator's
    # gradient
    (grad_x_t,) = torch.autograd.grad(path.x_t.sum(), x_0, retain_graph=True)
    (grad_v,) = torch.autograd.grad(path.velocity.sum(), x_0)
    assert torch.equal(grad_x_t, torch.full_like(x_0, 0.75)) and torch.equal(
        grad_v, -torch.ones_like(x_0)
    )


def test_times_must_be_one_per_sample(sample):
    with pytest.raises(ValueError, match='one time per sample'):
        expand_t(torch.tensor(0.5), sample[0])
    with pytest.raises(ValueError, match=r'shape \(16,\)'):
        LinearPath.interpolate(*sample, torch.rand(16, 1))
