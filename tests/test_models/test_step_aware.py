# Copyright (c) mmfgm authors.
"""The online network of a generator of several steps is told which of them made each sample."""

import copy

import pytest
import torch
from torch import nn

from mmfgm.flow import ClassifierFreeGuidance, NullLabel
from mmfgm.models import FGM, StepBiases
from mmfgm.models.families import find
from tests.family_checks import PROMPTS, TINY
from tests.gaussians import GaussianVelocity, implicit_velocity
from tests.test_models.test_data_space import mlp, sit, unet
from tests.test_models.test_few_step import FEW, batch, model
from tests.test_models.test_lora import ATTENTION
from tests.test_models.test_lora import NETWORK as LORA_NETWORK

A, MEANS = 0.5, torch.tensor([-1.0, 2.0], dtype=torch.float64)


class Mixture(nn.Module):
    """The flow of ``N(MEANS[k], A^2)``; without ``step``, which is k, of both in equal parts."""

    def forward(self, x_t, t, step=None):
        t = t[:, None].double()
        if step is not None:
            return implicit_velocity(x_t, t, A, MEANS[step][:, None])
        mean, variance = (1 - t) * MEANS, (1 - t) ** 2 * A**2 + t**2
        share = torch.softmax(-((x_t - mean) ** 2) / (2 * variance), dim=1)
        return (share * implicit_velocity(x_t, t, A, MEANS)).sum(1, keepdim=True)


def test_a_right_mixture_of_wrong_steps_is_seen_through_only_when_told():
    """The teacher's data are a mixture. Two steps that each make one half of it are at rest with
    the flow of what both make, and each is drawn towards all of the data with the flow of its
    own."""
    few = model(FEW)
    few.teacher, few.online = Mixture(), Mixture()
    step = torch.arange(4000) % 2
    torch.manual_seed(0)
    x_0 = A * torch.randn(4000, 1, dtype=torch.float64) + MEANS[step][:, None]
    x_0.requires_grad_()

    def pull(step):
        """The mean of what a step of descent would add to the samples of each half."""
        x_0.grad = None
        sum(
            value for name, value in few.generator_loss(x_0, {}, step).items() if 'loss' in name
        ).backward()
        return [-float(x_0.grad[k::2].sum()) for k in (0, 1)]

    assert pull(None) == pytest.approx([0, 0], abs=1e-12)
    low, high = pull(step)
    assert low > 0.01 and high < -0.01


def test_the_online_network_fits_each_step():
    """Its loss is lowest for the flow of each, and the mixture's is above it."""
    few = model(FEW)
    few.online = Mixture()
    step = torch.arange(4000) % 2
    torch.manual_seed(0)
    x_0 = A * torch.randn(4000, 1, dtype=torch.float64) + MEANS[step][:, None]
    told, untold = (float(few.online_loss(x_0, {}, step=k)['loss_fm']) for k in (step, None))
    assert told < untold


@pytest.mark.parametrize('make', [mlp, unet, sit, *TINY])
def test_it_is_a_bias_of_each_step_on_the_first_layer(make, tmp_path):
    """Against a copy of the network for each step, whose first layer has another bias."""
    torch.manual_seed(0)
    if isinstance(make, str):
        folder = TINY[make](tmp_path)
        network = find(folder).load(folder, latent_size=4)
        cond = find(folder).encode(folder, [*PROMPTS, PROMPTS[0]])
    else:
        network, cond = make(), dict(labels=torch.arange(3))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x_t, t, step = torch.randn(3, *network.event_shape), torch.rand(3), torch.tensor([1, 0, 1])
    plain = copy.deepcopy(network)
    names = set(network.state_dict())
    biases = StepBiases(network, 2)
    assert set(network.state_dict()) - names == {'step_biases.weight'}
    with torch.no_grad():
        expected = plain(x_t, t, **cond)
        torch.testing.assert_close(network(x_t, t, step=step, **cond), expected)
        nn.init.normal_(biases.weight)
        torch.testing.assert_close(network(x_t, t, **cond), expected)
        for k in (0, 1):
            other = copy.deepcopy(plain)
            layer = other.input_layer
            bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
            layer.bias = nn.Parameter(bias + biases.weight[k])
            found = network(x_t, t, step=step, **cond)[step == k]
            torch.testing.assert_close(
                found, other(x_t, t, **cond)[step == k], rtol=1e-4, atol=1e-4
            )
            assert (found - expected[step == k]).abs().max() > 1e-3


def test_guidance_and_real_data_are_told_too():
    """A guided online network sees samples twice, one that learns from data sees those beside."""
    few = model(
        FEW,
        online_guidance=dict(
            type='ClassifierFreeGuidance', scale=2.0, null=dict(type='NullLabel', label=9)
        ),
    )
    nn.init.normal_(few.online.step_biases.weight)
    x_t, t, step = torch.randn(6, 1, 8, 8), torch.rand(6), torch.arange(6) % 4
    cond = batch(6)['cond']
    v = ClassifierFreeGuidance(2.0, NullLabel(9))(few._told(step), x_t, t, cond)
    null = few.online(x_t, t, step=step, labels=torch.full((6,), 9))
    expected = null + 2 * (few.online(x_t, t, step=step, **cond) - null)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)

    few = model(FEW, online_loss=dict(type='RealUIDOnlineLoss', alpha=0.9, beta=0.9))
    real = dict(x_0=torch.randn(64, 1, 8, 8), cond=batch(64)['cond'])
    # so many that each step is drawn
    samples = few.prepare({**batch(64), 'real': real}, False)
    losses = few.loss('online', samples)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert (few.online.step_biases.weight.grad.abs().sum(1) > 0).all()


def test_adapters_over_a_shared_base_are_told():
    """The bias is the online network's own, not the base's."""
    torch.manual_seed(0)
    made = FGM(
        network=LORA_NETWORK,
        teacher=dict(checkpoint=None),
        fm_time_sampler=dict(type='Uniform'),
        fgm_time_sampler=dict(type='Uniform'),
        generator=FEW,
        lora=dict(rank=2, alpha=2, target_modules=ATTENTION),
    )
    nn.init.normal_(made.online.step_biases.weight)
    cond = dict(prompt_embeds=torch.randn(4, 5, 16), pooled_embeds=torch.randn(4, 8))
    samples = made.prepare(dict(idx=torch.arange(4), cond=cond), False)
    losses = made.loss('online', samples)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert made.online.step_biases.weight.grad.abs().sum() > 0
    x_t, t, step = samples['x_0'], torch.rand(4), samples['step']
    with torch.no_grad():
        plain = made.teacher(x_t, t, **cond)
        # adapters start at 0
        torch.testing.assert_close(made.online(x_t, t, **cond), plain)
        assert (made.online(x_t, t, step=step, **cond) - plain).abs().max() > 1e-3
        torch.testing.assert_close(made.teacher(x_t, t, **cond), plain)


def test_where_there_is_nothing_to_tell():
    for options in (dict(generator=None), dict(generator=FEW, step_aware=False)):
        made = model(**options)
        assert not any('step_biases' in key for key in made.state_dict())
        assert 'step' not in made.prepare(batch(4), False)
    told = model(FEW)
    assert 'online.step_biases.weight' in told.state_dict()
    assert set(told.prepare(batch(64), False)['step'].tolist()) == {0, 1, 2, 3}


def test_a_network_without_an_input_layer():
    with pytest.raises(ValueError, match='set model.step_aware=False'):
        StepBiases(GaussianVelocity(), 4)
