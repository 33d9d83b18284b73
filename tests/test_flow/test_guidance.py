# Copyright (c) mmfgm authors.
import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from mmfgm.flow import ClassifierFreeGuidance, NullLabel


class Network:
    calls = 0

    def __call__(self, x_t, t, labels):
        self.calls += 1
        return x_t * (labels[:, None] + 1.0) + t[:, None]


def test_formula_in_one_batched_call():
    x_t, t, cond = torch.randn(6, 2), torch.rand(6), dict(labels=torch.arange(6) % 3)
    network = Network()
    guided = ClassifierFreeGuidance(4.0, NullLabel(3))(network, x_t, t, cond)
    assert network.calls == 1
    v_cond, v_null = network(x_t, t, **cond), network(x_t, t, labels=torch.full((6,), 3))
    torch.testing.assert_close(guided, v_null + 4 * (v_cond - v_null))


def test_scale_one_is_the_conditional_velocity_at_half_the_cost():
    x_t, t, cond = torch.randn(6, 2), torch.rand(6), dict(labels=torch.arange(6) % 3)
    sizes = []

    def network(x_t, t, labels):
        sizes.append(len(x_t))
        return x_t

    assert torch.equal(
        ClassifierFreeGuidance(1, NullLabel(3))(network, x_t, t, cond), x_t
    ) and sizes == [6]


def test_gradient_flows_through_both_halves():
    x_t = torch.randn(4, 2, requires_grad=True)
    v = ClassifierFreeGuidance(2.0, NullLabel(3))(
        Network(), x_t, torch.rand(4), dict(labels=torch.zeros(4, dtype=torch.long))
    )
    (grad,) = torch.autograd.grad(v.sum(), x_t)
    torch.testing.assert_close(grad, torch.full((4, 2), 4 + 2 * (1.0 - 4.0)))


def test_rescaling_keeps_the_norm_of_the_conditional_velocity():
    x_t, t, cond = torch.randn(6, 2), torch.rand(6), dict(labels=torch.arange(6) % 3)
    network, null = Network(), NullLabel(3)
    guided = ClassifierFreeGuidance(4.0, null)(network, x_t, t, cond)
    rescaled = ClassifierFreeGuidance(4.0, null, rescale=True)(network, x_t, t, cond)
    torch.testing.assert_close(rescaled.norm(dim=1), network(x_t, t, **cond).norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(rescaled, guided)
    torch.testing.assert_close(cosine, torch.ones(6))


@pytest.mark.parametrize('patch', [None, 2])
def test_the_norm_of_latents_can_be_kept(patch):
    """Of whole samples, or of each 2 x 2 patch."""
    x_t, t, cond = torch.randn(3, 4, 6, 8), torch.rand(3), dict(labels=torch.arange(3))

    def network(x_t, t, labels):
        return torch.sin(x_t + labels.view(-1, 1, 1, 1))

    def patches(v):
        return v.flatten(1)[:, None] if patch is None else pixel_unshuffle(v, 2).flatten(2).mT

    options = dict(scale=4.0, null=NullLabel(3))
    guided = ClassifierFreeGuidance(**options)(network, x_t, t, cond)
    rescaled = ClassifierFreeGuidance(**options, rescale=True, patch=patch)(network, x_t, t, cond)
    norms = patches(network(x_t, t, **cond)).norm(dim=-1)
    torch.testing.assert_close(patches(rescaled).norm(dim=-1), norms)
    cosine = torch.nn.functional.cosine_similarity(patches(rescaled), patches(guided), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(norms))


def test_outside_of_its_interval_nothing_is_guided():
    x_t, cond = torch.randn(5, 2), dict(labels=torch.arange(5) % 3)
    t = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    network, null = Network(), NullLabel(3)
    found = ClassifierFreeGuidance(4.0, null, low=0.2, high=0.7)(network, x_t, t, cond)
    guided = ClassifierFreeGuidance(4.0, null)(network, x_t, t, cond)
    inside = torch.tensor([False, True, True, True, False])
    assert torch.equal(found[inside], guided[inside])
    torch.testing.assert_close(found[~inside], network(x_t, t, **cond)[~inside])
    with pytest.raises(ValueError, match='0 <= low <= high <= 1'):
        ClassifierFreeGuidance(4.0, null, low=0.7, high=0.2)


@pytest.mark.parametrize('rescale, dims', [(True, (1, 2, 3)), ((-1,), (3,))])
def test_images_are_rescaled_whole_or_row_by_row(rescale, dims):
    x_t, t = torch.randn(3, 2, 4, 5, dtype=torch.float64), torch.rand(3)
    cond = dict(scale=torch.rand(3, 1, 1, 1))

    def network(x_t, t, scale):
        return torch.sin(scale * x_t)

    def null(cond):
        return dict(scale=2 * cond['scale'])

    v_cond = network(x_t, t, **cond)
    guided = ClassifierFreeGuidance(4.0, null)(network, x_t, t, cond)
    rescaled = ClassifierFreeGuidance(4.0, null, rescale=rescale)(network, x_t, t, cond)
    factor = (v_cond.square().sum(dims, True) / guided.square().sum(dims, True)).sqrt()
    torch.testing.assert_close(rescaled, guided * factor)
