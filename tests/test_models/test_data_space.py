# Copyright (c) mmfgm authors.
"""The generator of several steps from the same noise against a loop written by hand."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from mmfgm.apis import FGMInferencer, OneStepPipeline, export_generator, read_config
from mmfgm.models import DataSpaceGenerator, OneStepGenerator, Sampling
from mmfgm.models.networks import AdaLNMLP, EDMUNet, EDMVelocity, SiT
from tests.test_apis.conftest import DIGITS, make_problem, sd3_config
from tests.test_models.test_few_step import batch, cycles, gradients, model
from tests.tiny_sd3 import make_tiny_sd3

COEFFICIENTS = dict(t_star=0.9, c_skip=0.8, c_out=0.7, c_in=0.6)
DATA_SPACE = dict(type='DataSpaceGenerator', steps=3)
UNET = dict(
    in_channels=1, out_channels=1, label_dim=10, model_channels=32, num_blocks=1, dropout=0.0
)


def mlp():
    return AdaLNMLP((1, 4, 4), width=8, depth=1, embed_dim=8, num_classes=10)


def unet():
    return EDMVelocity(EDMUNet(8, **UNET, channel_mult=(1,), attn_resolutions=()))


def sit():
    return SiT(latent_size=4, in_channels=1, width=16, depth=1, num_heads=2, num_classes=10)


def randomised(network):
    torch.manual_seed(0)
    network = network.double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    return network


class Given(nn.Module):
    """A network to whose first layer the estimate and the step are given as the paper has it: as
    further input channels, and as a bias."""

    def __init__(self, generator):
        super().__init__()
        self.network = copy.deepcopy(generator.network)
        # the hook of the original is no part of the reference
        self.network.input_layer._forward_hooks.clear()
        self.extra, self.biases = generator.estimate_layer.weight, generator.step_biases

    def forward(self, x_t, t, estimate, k, labels):
        layer = self.network.input_layer
        weight = torch.cat([layer.weight, self.extra], dim=1)
        if isinstance(layer, nn.Linear):
            made = linear(torch.cat([x_t.flatten(1), estimate.flatten(1)], 1), weight, layer.bias)
            made = made + self.biases[k]
        else:
            options = dict(stride=layer.stride, padding=layer.padding)
            made = conv2d(torch.cat([x_t, estimate], 1), weight, layer.bias, **options)
            made = made + self.biases[k][:, :, None, None]
        handle = layer.register_forward_hook(lambda *args: made)
        v = self.network(x_t, t, labels)
        handle.remove()
        return v


@pytest.mark.parametrize('make', [mlp, sit])
def test_steps_have_the_gradient_of_a_loop_written_by_hand(make):
    generator = DataSpaceGenerator(randomised(make()), 3, weights=(1, 2, 3), **COEFFICIENTS)
    for p in (generator.estimate_layer.weight, generator.step_biases):
        nn.init.normal_(p, std=0.3)
    z, target = torch.randn(2, 24, 1, 4, 4, dtype=torch.float64)
    labels = torch.arange(24) % 10
    random.seed(1)
    x_0 = generator(z, labels=labels)
    random.seed(1)
    k = random.choices(range(3), (1, 2, 3), k=24)
    assert set(k) == {0, 1, 2}
    reference = Given(generator)

    def by_hand(through):
        samples = []
        for n in range(24):
            estimate = torch.zeros_like(z[:1])
            for i in range(k[n] + 1):
                estimate = estimate if through else estimate.detach()
                t = torch.full((1,), COEFFICIENTS['t_star'])
                given = estimate, torch.tensor([i]), labels[n : n + 1]
                v = reference(COEFFICIENTS['c_in'] * z[n : n + 1], t, *given)
                estimate = COEFFICIENTS['c_skip'] * z[n : n + 1] - COEFFICIENTS['c_out'] * v
            samples.append(estimate)
        return torch.cat(samples)

    expected = by_hand(False)
    torch.testing.assert_close(x_0, expected, rtol=1e-10, atol=1e-12)
    found = dict(
        zip((name for name, _ in generator.named_parameters()), gradients(generator, x_0, target))
    )
    theirs = {
        {'extra': 'estimate_layer.weight', 'biases': 'step_biases'}.get(name, name): gradient
        for (name, _), gradient in zip(
            reference.named_parameters(), gradients(reference, expected, target)
        )
    }
    assert found.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)
    other = gradients(reference, by_hand(True), target)
    name = next(iter(theirs))
    assert (other[0] - theirs[name]).norm() > 0.01 * theirs[name].norm()
    for nfe in (1, 2, 3):
        k = [nfe - 1] * 24
        torch.testing.assert_close(generator(z, nfe, labels=labels), by_hand(False))


@pytest.mark.parametrize('make', [mlp, unet, sit])
def test_every_step_begins_as_the_one_step_generator(make):
    network = randomised(make())
    one = OneStepGenerator(copy.deepcopy(network), **COEFFICIENTS)
    several = DataSpaceGenerator(network, 4, **COEFFICIENTS)
    size = 8 if make is unet else 4
    z, labels = torch.randn(3, 1, size, size, dtype=torch.float64), torch.tensor([1, 2, 3])
    expected = one(z, labels=labels)
    for nfe in (None, 1, 2, 3, 4):
        assert torch.equal(several(z, nfe, labels=labels), expected)


def test_a_copy_has_hooks_of_its_own():
    """As averages have, which are copies."""
    generator = DataSpaceGenerator(randomised(mlp()), 2)
    copied = copy.deepcopy(generator)
    nn.init.ones_(copied.step_biases)
    nn.init.normal_(copied.estimate_layer.weight)
    z, labels = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([1, 2, 3])
    plain = OneStepGenerator(randomised(mlp()))
    assert torch.equal(generator(z, 2, labels=labels), plain(z, labels=labels))
    assert (copied(z, 2, labels=labels) - plain(z, labels=labels)).abs().max() > 0.01


def test_it_is_trained_and_averaged():
    trained = model(DATA_SPACE)
    for name in ('generator', 'generator_ema'):
        nn.init.zeros_(getattr(trained, name).step_biases)
        nn.init.zeros_(getattr(trained, name).estimate_layer.weight)
    before = {name: p.clone() for name, p in trained.generator.named_parameters()}
    cycles(trained, 3)
    moved = {
        name: (p - before[name]).abs().max() for name, p in trained.generator.named_parameters()
    }
    assert min(moved.values()) > 1e-3
    assert trained.generators == dict(generator=3, generator_ema=3)
    whole = trained.sample(batch(8), Sampling('generator', 3))
    assert (whole - trained.sample(batch(8), Sampling('generator', 2))).abs().max() > 1e-3


def test_export(tmp_path):
    """Of a network of a pipeline too: no pipeline hands its network the last estimate."""
    for name, text in dict(
        digits=DIGITS + "\nmodel['generator'] = dict(_delete_=True, **GENERATOR)",
        sd3=sd3_config(make_tiny_sd3(tmp_path / 'base')) + "\nmodel['generator'] = GENERATOR",
    ).items():
        (tmp_path / name).mkdir()
        problem = make_problem(tmp_path / name, f'GENERATOR = {DATA_SPACE!r}\n{text}')
        out = str(tmp_path / name / 'out')
        assert export_generator(read_config(problem.config), problem.weights, out) == 'generator'
        inputs = [3, 1] if name == 'digits' else ['a red cat', 'a blue dog']
        for nfe in (1, 3):
            ours, theirs = (
                torch.stack(list(made))
                for made in (
                    FGMInferencer(problem.config, problem.weights, device='cpu')(
                        inputs, seeds=[0, 1], nfe=nfe, out='tensor'
                    )['predictions'],
                    OneStepPipeline.from_pretrained(out, device='cpu')(
                        **{'labels' if name == 'digits' else 'prompt': inputs},
                        seeds=[0, 1],
                        nfe=nfe,
                        output_type='tensor',
                    ).images,
                )
            )
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(steps=0), 'expected 1 to 1000 steps, found 0'),
        (dict(steps=10**12), 'expected 1 to 1000 steps'),
        (dict(steps=2, weights=(1,)), 'a weight for each of the 2 steps'),
        (dict(steps=2, weights=(0, 0)), 'weights of at least 0'),
        (dict(network=nn.Linear(2, 2)), 'a network with an input_layer'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSpaceGenerator(**{'network': mlp(), **settings})
