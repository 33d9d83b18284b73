# Copyright (c) mmfgm authors.
"""The few-step generator against loops written by hand, the one-step generator, and Euler's
method."""

import copy
import random
from itertools import pairwise

import pytest
import torch
from torch import nn

import mmfgm.models  # noqa: F401
from mmfgm.apis import read_config
from mmfgm.apis.rehearsal import rehearse
from mmfgm.errors import UsageError
from mmfgm.flow import euler, uniform_times
from mmfgm.models import FGM, FewStepGenerator, OneStepGenerator, Sampling
from tests.batches import rows
from tests.conftest import NETWORK, ROOT
from tests.gaussians import GaussianVelocity

TIMES = (0.9, 0.7, 0.4, 0.2)
COEFFICIENTS = dict(c_skip=(0.9, 1, 1, 1), c_out=(0.9, 0.6, 0.5, 0.2), c_in=(0.8, 1.1, 1, 1))


class Network(nn.Module):
    """A velocity that depends on all it is given, and counts its calls."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.inner = nn.Linear(5, 16, dtype=dtype)
        self.outer = nn.Linear(16, 3, dtype=dtype)
        self.calls = []

    def forward(self, x_t, t, level):
        assert t.dtype == torch.float32 and t.shape == x_t.shape[:1]
        self.calls.append((len(x_t), torch.is_grad_enabled()))
        features = torch.cat([x_t, t.to(x_t.dtype)[:, None], level[:, None]], dim=1)
        return self.outer(self.inner(features).tanh())


def model(generator, **options):
    torch.manual_seed(0)
    made = FGM(
        network=NETWORK,
        teacher=dict(checkpoint=None),
        fm_time_sampler=dict(type='LogitNormal'),
        fgm_time_sampler=dict(type='LogitNormal', low=0.02),
        generator=generator,
        ema=dict(generator_ema=0.9),
        **options,
    )
    for network in made.networks.values():
        for p in network.parameters():
            nn.init.normal_(p, std=0.1)
    return made


def batch(n):
    labels = torch.arange(n) % 10
    return dict(idx=torch.arange(n), seed=torch.arange(n), cond=dict(labels=labels))


def cycles(trained, count):
    """Algorithm 1, as the loop runs it; returns the losses."""
    optimizers = {
        name: torch.optim.Adam(getattr(trained, name).parameters(), lr=1e-2)
        for name in ('online', 'generator')
    }
    values = []
    for _ in range(count):
        for phase, spec in trained.phases.items():
            trained.online.requires_grad_('online' not in spec.freezes)
            losses = trained.loss(phase, trained.prepare(batch(8), spec.differentiable))
            loss = sum(value for name, value in losses.items() if 'loss' in name)
            loss.backward()
            optimizers[phase].step()
            optimizers[phase].zero_grad()
            values.append(loss.item())
    return values


def test_one_time_is_the_one_step_generator_bit_for_bit():
    """Losses, weights and samples after three cycles, and the random numbers that were drawn."""
    settings = dict(c_skip=0.8, c_in=0.8)
    one = model(dict(t_star=0.8, **settings))
    few = model(dict(type='FewStepGenerator', times=[0.8], **settings))
    torch.manual_seed(1)
    expected = cycles(one, 3)
    state = torch.get_rng_state(), random.getstate()
    torch.manual_seed(1)
    assert cycles(few, 3) == expected
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    weights = one.state_dict()
    assert few.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in few.state_dict().items())
    samples = [each.sample(batch(4), Sampling('generator')) for each in (one, few)]
    assert torch.equal(*samples)


def trained_by_hand(generator, z, k, eps, level, through=False):
    """Backward simulation of one sample after the other; ``through`` leaves its gradient."""
    t = generator.times

    def step(x_t, i, level):
        v = generator.network(c_in[i] * x_t, torch.full((1,), t[i]), level=level)
        return c_skip[i] * x_t - c_out[i] * v

    c_skip, c_out, c_in = COEFFICIENTS.values()
    samples = []
    for n in range(len(z)):
        x_t = z[n : n + 1]
        for i in range(k[n]):
            x_0 = step(x_t, i, level[n : n + 1])
            x_t = (1 - t[i + 1]) * x_0 + t[i + 1] * eps[i][n : n + 1]
            x_t = x_t if through else x_t.detach()
        samples.append(step(x_t, k[n], level[n : n + 1]))
    return torch.cat(samples)


def gradients(network, x_0, target):
    return torch.autograd.grad((x_0 - target).square().sum(), list(network.parameters()))


def test_four_steps_have_the_gradient_of_a_loop_written_by_hand():
    torch.manual_seed(0)
    network = Network()
    generator = FewStepGenerator(network, TIMES, weights=(1, 2, 3, 2), **COEFFICIENTS)
    z, target = torch.randn(2, 40, 3, dtype=torch.float64)
    level = torch.rand(40, dtype=torch.float64)
    torch.manual_seed(1)
    random.seed(1)
    x_0 = generator(z, level=level)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    random.seed(1)
    k = random.choices(range(4), (1, 2, 3, 2), k=40)
    eps = [torch.randn_like(z) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state) and set(k) == {0, 1, 2, 3}
    expected = trained_by_hand(generator, z, k, eps, level)
    torch.testing.assert_close(x_0, expected, rtol=1e-12, atol=1e-12)
    found = gradients(network, x_0, target)
    torch.testing.assert_close(found, gradients(network, expected, target), rtol=1e-10, atol=1e-12)
    # with the gradient through earlier steps it is another one
    other = gradients(network, trained_by_hand(generator, z, k, eps, level, through=True), target)
    assert (found[0] - other[0]).norm() > 0.01 * other[0].norm()


def saved_bytes(make):
    """Of what autograd keeps for the backward pass of ``make()``."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        make()
    return sum(kept)


def test_the_graph_is_that_of_one_step():
    torch.manual_seed(0)
    network = Network()
    z = torch.randn(32, 3, dtype=torch.float64)
    level = torch.rand(32, dtype=torch.float64)
    one = FewStepGenerator(network, (1.0,))
    four = FewStepGenerator(network)
    assert saved_bytes(lambda: four(z, level=level)) == saved_bytes(lambda: one(z, level=level))
    network.calls.clear()
    random.seed(0)
    four(z, level=level)
    sizes, with_gradient = zip(*network.calls)
    assert with_gradient == (False, False, False, True)
    # a step is made by those samples alone that go further
    assert sizes[0] > sizes[1] > sizes[2] > 0 and sizes[3] == 32


def test_every_process_calls_the_network_equally_often():
    """Also where no sample of a batch goes further: sharded networks wait for each other."""
    network = Network()
    torch.manual_seed(0)
    z, level = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    first = FewStepGenerator(network, weights=(1, 0, 0, 0))
    x_0 = first(z, level=level)
    assert [size for size, _ in network.calls] == [1, 1, 1, 2]
    torch.testing.assert_close(x_0, first(z, 1, level=level))


def test_steps_are_trained_in_the_proportion_of_their_weights():
    torch.manual_seed(0)
    generator = FewStepGenerator(Network(), weights=(4, 0, 1, 3))
    k = torch.tensor(generator.draw_steps(40_000))
    shares = k.bincount(minlength=4) / 40_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0, 0.125, 0.375]), rtol=0, atol=0.01)


def test_its_memory_is_rehearsed_as_of_one_step():
    """On tensors without values, which cannot say how many samples go further."""
    no_teacher = {'model.teacher.checkpoint': None}
    one, few = (
        rehearse(read_config(f'{ROOT}/configs/fgm/{name}.py', no_teacher), gpus=1)
        for name in ('digits', 'digits_4step')
    )
    # not all of the samples that are made on the way are part of the peak
    assert few.phases['generator'].peak == pytest.approx(one.phases['generator'].peak, rel=0.02)


def test_sampling_is_the_loop_of_training():
    """Each number of calls against a loop, with the noise it is given."""
    torch.manual_seed(0)
    generator = FewStepGenerator(Network(), TIMES, **COEFFICIENTS)
    z = torch.randn(6, 3, dtype=torch.float64)
    level = torch.rand(6, dtype=torch.float64)
    eps = torch.randn(3, 6, 3, dtype=torch.float64)
    for nfe in (1, 2, 3, 4):
        expected = trained_by_hand(generator, z, [nfe - 1] * 6, eps, level)
        torch.testing.assert_close(
            generator(z, nfe, eps[: nfe - 1], level=level), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize('nfe', [1, 2, 3, 4])
def test_deterministic_steps_of_a_teacher_are_eulers(nfe):
    flow = GaussianVelocity(0.5, 0.3)
    z = torch.randn(64, 2, dtype=torch.float64)
    found = FewStepGenerator(flow, 4)(z, nfe)
    times = torch.cat([uniform_times(4)[:nfe], torch.zeros(1)])
    torch.testing.assert_close(found, euler(flow, z, times), rtol=1e-6, atol=1e-6)


def test_the_first_step_takes_noise_whatever_its_time():
    """Below t = 1 too, the noise that a deterministic second step goes on with is z."""
    torch.manual_seed(0)
    generator = FewStepGenerator(Network(), (0.8, 0.4), c_skip=(0.8, 1), c_in=(0.8, 1))
    z = torch.randn(6, 3, dtype=torch.float64)
    level = torch.rand(6, dtype=torch.float64)
    torch.testing.assert_close(generator(z, 2, level=level), generator(z, 2, z[None], level=level))


def test_times_by_number_and_shift():
    assert FewStepGenerator(Network(), 4).times == (1.0, 0.75, 0.5, 0.25)
    shifted = FewStepGenerator(Network(), 4, shift=3.0).times
    assert shifted == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert all(a > b for a, b in pairwise(shifted))


FEW = dict(type='FewStepGenerator', times=4)


@pytest.mark.parametrize('deterministic', [False, True])
def test_a_sample_depends_on_its_own_seed_alone(deterministic):
    few = model(FEW)
    sampling = Sampling('generator_ema', 3, deterministic=deterministic)
    state = torch.get_rng_state()
    whole = few.sample(batch(10), sampling)
    assert torch.equal(torch.get_rng_state(), state)
    parts = [few.sample(rows(batch(10), index), sampling) for index in ([7], [3, 9, 1])]
    torch.testing.assert_close(torch.cat(parts), whole[[7, 3, 9, 1]], rtol=1e-5, atol=1e-6)
    other = few.sample(batch(10), Sampling('generator_ema', 3, deterministic=not deterministic))
    assert (other - whole).abs().max() > 1e-3
    # NFE 2 re-noises with the numbers that NFE 3 begins with
    assert torch.equal(few.sampler.noises([5], 3)[:2], few.sampler.noises([5], 2))
    assert torch.equal(few.sampler.noises([5], 3)[0], few.sampler.noise([5]))


def test_every_loss_takes_it():
    for loss in ('FGMLoss', 'DMDLoss', 'DiffInstructLoss', 'RealUIDLoss'):
        few = model(FEW, loss=dict(type=loss))
        losses = few.loss('generator', few.prepare(batch(8), True))
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        assert all(p.grad is not None for p in few.generator.parameters())


def test_it_starts_as_the_teachers_estimate_at_each_time():
    few = model(FEW)
    few.generator.network.load_state_dict(copy.deepcopy(few.teacher.state_dict()))
    b = batch(4)
    x_t = torch.randn(4, 1, 8, 8)
    for k, time in enumerate(few.generator.times):
        t = torch.full((4,), time)
        expected = x_t - time * few.teacher(x_t, t, **b['cond'])
        found = few.generator._estimate(x_t, torch.full((4,), k), b['cond'])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(times=(0.5, 0.7)), r'decreasing times in \(0, 1\]'),
        (dict(times=(0.7, 0.7)), 'decreasing times'),
        (dict(times=(1.2, 0.7)), 'decreasing times'),
        (dict(times=(1.0, 0.0)), 'decreasing times'),
        (dict(times=()), 'decreasing times'),
        (dict(times=0), 'expected 1 to 1000 times'),
        (dict(times=10**12), 'expected 1 to 1000 times'),
        (dict(times=4, shift=0.0), 'positive shift'),
        (dict(times=(1.0, 0.5), shift=3.0), 'no shift of given times'),
        (dict(times=4, c_in=(0.8, 1)), 'c_in of one number for each of the 4 times'),
        (dict(times=2, c_out=(1, 0)), 'c_out other than 0'),
        (dict(times=2, weights=(0, 0)), 'weights of at least 0'),
        (dict(times=2, weights=(-1, 2)), 'weights of at least 0'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FewStepGenerator(Network(), **settings)


def test_bad_samplings():
    few, one = model(FEW), model(None)
    with pytest.raises(UsageError, match='generator of 4 steps: its NFE is 1 to 4, not 5'):
        few.check(Sampling('generator_ema', 5))
    with pytest.raises(UsageError, match='generator of 1 step: its NFE is 1, not 2'):
        one.check(Sampling('generator_ema', 2))
    for each, network in ((few, 'teacher'), (one, 'generator')):
        with pytest.raises(UsageError, match='of a generator of few steps'):
            each.check(Sampling(network, deterministic=True))
    few.check(Sampling('generator', 4, deterministic=True))
    assert isinstance(one.generator, OneStepGenerator)
