# Copyright (c) mmfgm authors.
import pytest
import torch
from mmengine.registry import DefaultScope

import mmfgm.models  # noqa: F401
from mmfgm.errors import UsageError
from mmfgm.flow import LinearPath, edm_times, heun
from mmfgm.models import FGM, FlowMatching, Sampling
from tests.batches import rows
from tests.conftest import NETWORK


def randomise(network):
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)


@pytest.fixture
def fgm():
    torch.manual_seed(0)
    sampler = dict(type='LogitNormal')
    model = FGM(
        network=NETWORK,
        teacher=dict(checkpoint=None),
        fm_time_sampler=sampler,
        fgm_time_sampler=sampler,
        generator=dict(t_star=0.97),
        ema=dict(generator_ema=0.9, generator_ema_slow=0.99),
    )
    for name in ('teacher', 'online', 'generator', 'generator_ema'):
        randomise(getattr(model, name))
    return model


def batch(n, **extra):
    labels = torch.arange(n) % 10
    return dict(idx=torch.arange(n), seed=torch.arange(n), cond=dict(labels=labels), **extra)


def test_everything_starts_from_the_teacher():
    torch.manual_seed(0)
    sampler = dict(type='LogitNormal')
    model = FGM(
        network=NETWORK,
        teacher=dict(checkpoint=None),
        fm_time_sampler=sampler,
        fgm_time_sampler=sampler,
    )
    teacher = model.teacher.state_dict()
    for other in (model.online, model.generator.network, model.generator_ema.network):
        assert all(torch.equal(value, teacher[key]) for key, value in other.state_dict().items())
        assert all(p is not q for p, q in zip(other.parameters(), model.teacher.parameters()))


def test_gradients_reach_only_what_a_phase_trains(fgm):
    trainable = dict(online=fgm.online, generator=fgm.generator)
    for phase, spec in fgm.phases.items():
        fgm.zero_grad()
        fgm.online.requires_grad_('online' not in spec.freezes)
        samples = fgm.prepare(batch(8), spec.differentiable)
        fgm.loss(phase, samples)[{'online': 'loss_fm', 'generator': 'loss_fgm'}[phase]].backward()
        touched = {
            name
            for name, child in fgm.named_children()
            if any(p.grad is not None for p in child.parameters())
        }
        assert touched == {phase}
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0
            for p in trainable[phase].parameters()
            if p.ndim > 1 and p.shape[0] != 11
        )  # an embedding row of an absent class has no gradient


def test_samples_shared_by_phases_keep_the_generators_graph(fgm):
    """x_0 drawn once serves the online loss without gradient and the generator loss with it."""
    samples = fgm.prepare(batch(8), differentiable=True)
    fgm.loss('online', samples)['loss_fm'].backward()
    assert all(p.grad is None for p in fgm.generator.parameters())
    fgm.loss('generator', samples)['loss_fgm'].backward()
    assert any(p.grad is not None for p in fgm.generator.parameters())


def test_noise_is_a_function_of_the_seed_alone(fgm):
    whole = fgm.sample(batch(10), Sampling('generator_ema'))
    b = batch(10)
    parts = [fgm.sample(rows(b, index), Sampling('generator_ema')) for index in ([7], [3, 9, 1])]
    torch.testing.assert_close(torch.cat(parts), whole[[7, 3, 9, 1]], rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        whole[0], fgm.sample({**b, 'seed': b['seed'] + 1}, Sampling('generator_ema'))[0]
    )


def test_sampling_does_not_move_the_training_random_state_and_keeps_modes(fgm):
    fgm.train()
    state = torch.get_rng_state()
    fgm.sample(batch(4), Sampling('teacher', 4, 'heun'))
    fgm.sample(batch(4), Sampling('generator'))
    assert torch.equal(torch.get_rng_state(), state)
    assert fgm.generator.training and not fgm.teacher.training and not fgm.generator_ema.training


def test_a_sampling_takes_edms_times_if_asked(fgm):
    b = batch(4)
    with torch.no_grad():
        expected = heun(
            lambda x, t: fgm.teacher(x, t, **b['cond']), fgm.sampler.noise(b['seed']), edm_times(3)
        )
    torch.testing.assert_close(
        fgm.sample(b, Sampling('teacher', 6, 'heun', spacing='edm')), expected, rtol=0, atol=1e-5
    )
    assert (fgm.sample(b, Sampling('teacher', 6, 'heun')) - expected).abs().max() > 1e-3


def test_one_euler_step_of_the_teacher_is_a_generator_at_t_1(fgm):
    fgm.generator.network.load_state_dict(fgm.teacher.state_dict())
    fgm.generator.t_star = fgm.generator.c_out = 1.0
    torch.testing.assert_close(
        fgm.sample(batch(4), Sampling('teacher', 1)), fgm.sample(batch(4), Sampling('generator'))
    )


@pytest.mark.parametrize(
    'bad, match',
    [
        (lambda m: m.sample(batch(2), Sampling('student')), 'no network'),
        (lambda m: m.sample(batch(2), Sampling('generator', 2)), 'NFE is 1'),
        (lambda m: Sampling('teacher', 3, 'heun'), 'multiple'),
        (lambda m: Sampling('teacher', 3, 'rk45'), 'euler or heun'),
        (lambda m: Sampling('teacher', 4, spacing='karras'), 'uniform or edm'),
        (lambda m: Sampling('teacher', 4, shift=3.0, spacing='edm'), 'or shift=None'),
        (lambda m: m._check_ema(dict(average=0.9)), 'generator_ema'),
        (lambda m: m._check_ema(dict(generator_ema=1.0)), r'\[0, 1\)'),
    ],
)
def test_bad_requests(fgm, bad, match):
    with pytest.raises(UsageError, match=match):
        bad(fgm)


def test_guided_teacher_changes_the_generator_loss():
    torch.manual_seed(0)
    settings = dict(
        network=NETWORK,
        teacher=dict(checkpoint=None),
        fm_time_sampler=dict(type='Uniform'),
        fgm_time_sampler=dict(type='Uniform'),
    )
    null = dict(type='NullLabel', label=10)
    losses = []
    for guidance in (
        None,
        dict(type='ClassifierFreeGuidance', scale=1.0, null=null),
        dict(type='ClassifierFreeGuidance', scale=4.0, null=null),
    ):
        torch.manual_seed(1)
        model = FGM(**settings, guidance=guidance)
        for network in model.networks.values():
            randomise(network)
        torch.manual_seed(2)
        losses.append(model.loss('generator', model.prepare(batch(8), True))['loss_fgm'])
    assert losses[0] == losses[1] and losses[0] != losses[2]


def test_label_dropout_trains_the_null_condition():
    model = FlowMatching(
        network=NETWORK,
        time_sampler=dict(type='Uniform'),
        null_prob=0.5,
        null_condition=dict(type='NullLabel', label=10),
    )
    torch.manual_seed(0)
    labels = model._drop_conditions(dict(labels=torch.zeros(1000, dtype=torch.long)), 1000, 'cpu')[
        'labels'
    ]
    assert set(labels.tolist()) == {0, 10} and 400 < (labels == 10).sum() < 600
    with pytest.raises(UsageError, match='null_condition'):
        FlowMatching(network=NETWORK, time_sampler=dict(type='Uniform'), null_prob=0.5)


def test_condition_must_match_the_network(fgm):
    with pytest.raises(ValueError, match='num_classes agree'):
        fgm.teacher(torch.zeros(2, 1, 8, 8), torch.zeros(2))


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        yield


def guided_fgm(**kwargs):
    torch.manual_seed(0)
    uniform = dict(type='Uniform')
    options = dict(fm_time_sampler=uniform, fgm_time_sampler=uniform, teacher=dict(checkpoint=None))
    model = FGM(NETWORK, **{**options, **kwargs})
    for name in ('teacher', 'online', 'generator'):
        randomise(getattr(model, name))
    return model


GUIDANCE = dict(type='ClassifierFreeGuidance', scale=3.0, null=dict(type='NullLabel', label=10))


def test_long_and_short_guidance():
    """The online network is trained on its guided velocity and guided in the generator's loss."""
    model = guided_fgm(guidance=GUIDANCE, online_guidance=GUIDANCE)
    samples = model.prepare(batch(8), differentiable=True)
    x_0, cond = samples['x_0'], samples['cond']
    null = dict(labels=torch.full((8,), 10))

    def guided(network, path):
        v_null = network(path.x_t, path.t, **null)
        return v_null + 3 * (network(path.x_t, path.t, **cond) - v_null)

    torch.manual_seed(1)
    found = model.loss('online', samples)['loss_fm']
    torch.manual_seed(1)
    path = LinearPath.sample(x_0.detach(), model.fm_time_sampler(8))
    expected = (guided(model.online, path) - path.velocity).square().mean()
    torch.testing.assert_close(found, expected)

    torch.manual_seed(2)
    found = model.loss('generator', samples)['loss_fgm']
    torch.manual_seed(2)
    path = LinearPath.sample(x_0, model.fgm_time_sampler(8))
    u, v = guided(model.teacher, path), guided(model.online, path)
    expected = ((u - path.velocity).square() - (v - path.velocity).square()).mean()
    torch.testing.assert_close(found, expected)


def test_real_samples_train_the_online_network_with_realuid():
    """One call of the network for both, and the formula of the loss on each."""
    loss = dict(type='RealUIDOnlineLoss', alpha=0.9, beta=0.95)
    model = guided_fgm(online_loss=loss, loss=dict(type='RealUIDLoss', alpha=0.9, beta=0.95))
    real = dict(x_0=torch.randn(8, *model.event_shape), cond=dict(labels=torch.arange(8)))
    samples = model.prepare(batch(8, real=real), differentiable=False)
    torch.manual_seed(1)
    found = model.loss('online', samples)['loss_fm']
    torch.manual_seed(1)
    path = LinearPath.sample(samples['x_0'], model.fm_time_sampler(8))
    other = LinearPath.sample(real['x_0'], model.fm_time_sampler(8))
    v = model.online(path.x_t, path.t, **samples['cond'])
    v_real = model.online(other.x_t, other.t, **real['cond'])
    expected = 0.9 * (v - 0.95 / 0.9 * path.velocity).square().mean()
    expected = expected + 0.1 * (v_real - 0.05 / 0.1 * other.velocity).square().mean()
    torch.testing.assert_close(found, expected)
    with pytest.raises(UsageError, match='learns from real samples too.*WithReal'):
        model.prepare(batch(8), differentiable=False)


@pytest.mark.parametrize('loss', [dict(type='DMDLoss'), dict(type='DiffInstructLoss')])
def test_losses_given_by_a_gradient_keep_no_graph_of_the_networks(loss):
    uniform = dict(type='Uniform', low=0.02)
    model = guided_fgm(loss=loss, fgm_time_sampler=uniform)
    seen = []
    model.online.register_forward_hook(lambda *args: seen.append(args[-1].requires_grad))
    samples = model.prepare(batch(8), differentiable=True)
    losses = model.loss('generator', samples)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert seen == [False]
    assert all(p.grad is None for p in model.online.parameters())
    assert any(p.grad is not None for p in model.generator.parameters())


def test_a_weight_that_is_not_defined_at_0_needs_a_density_that_ends_above():
    with pytest.raises(UsageError, match='not defined at t = 0.*low=0.02'):
        guided_fgm(loss=dict(type='DiffInstructLoss'))
    with pytest.raises(UsageError, match='not defined at t = 0'):
        guided_fgm(loss=dict(type='FGMLoss', weight=dict(t=-0.5)))
    guided_fgm(loss=dict(type='DiffInstructLoss', weight=dict(t=1.0)))
    for density in (dict(type='LogitNormal', low=0.01), dict(type='EDMGrid')):
        guided_fgm(loss=dict(type='DiffInstructLoss'), fgm_time_sampler=density)


def test_one_scale_for_the_whole_loss():
    losses = []
    for scale in (1.0, 50.0):
        model = guided_fgm(loss_scale=scale)
        samples = model.prepare(batch(8), differentiable=True)
        torch.manual_seed(1)
        losses.append(model.loss('generator', samples))
    torch.testing.assert_close(losses[1]['loss_fgm'], 50 * losses[0]['loss_fgm'])
    torch.testing.assert_close(losses[1]['l_2'], losses[0]['l_2'])
