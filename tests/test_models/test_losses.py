# Copyright (c) mmfgm authors.
import pytest
import torch

from mmfgm.flow import PathSample
from mmfgm.models.losses import FGMLoss, FlowMatchingLoss, fgm_terms, flow_matching_loss


def path_of(velocity):
    """Of a path sample, losses take the velocity alone."""
    return PathSample(x_0=None, eps=None, t=None, x_t=None, velocity=velocity)


@pytest.fixture
def velocities():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3)]


def sq(x):
    return x.flatten(1).square().sum(1)


def test_terms_are_per_sample_and_have_the_identity(velocities):
    u, v, target = velocities
    l_1, l_2 = fgm_terms(u, v, path_of(target))
    assert l_1.shape == l_2.shape == (5,)
    torch.testing.assert_close(l_1, sq(u - v))
    torch.testing.assert_close(l_1 + l_2, sq(u - target) - sq(v - target))


@pytest.mark.parametrize('alpha, l1_weight', [(0.5, 1.0), (1.0, 0.0), (1.2, -0.4)])
def test_l1_weight_is_sid_alpha(velocities, alpha, l1_weight):
    """SiD's loss (1 - alpha) ||d||^2 + d^T (v - c), up to its factor 2."""
    u, v, target = velocities
    sid = (1 - alpha) * sq(u - v) + ((u - v) * (v - target)).flatten(1).sum(1)
    out = FGMLoss(l1_weight=l1_weight, loss_scale=50)(u, v, path_of(target))
    torch.testing.assert_close(out['loss_fgm'], 100 * sid.mean())


def test_gradient_vanishes_where_flows_agree(velocities):
    """At u = v, L_2 still pulls through x_0 only in expectation; L_1 has no gradient at all."""
    u, _, target = velocities
    v = u.clone().requires_grad_(True)
    l_1, _ = fgm_terms(u, v, path_of(target))
    (grad,) = torch.autograd.grad(l_1.sum(), v)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_flow_matching_loss(velocities):
    v, target, _ = velocities
    torch.testing.assert_close(flow_matching_loss(v, path_of(target)), sq(v - target))
    loss = FlowMatchingLoss()(None, v, path_of(target))
    torch.testing.assert_close(loss['loss_fm'], sq(v - target).mean())
