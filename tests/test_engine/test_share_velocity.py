# Copyright (c) mmfgm authors.
"""One forward of the online network for both phases: the gradients of separate ones, on one process
and several, stopped and resumed."""

import pytest
import torch

from mmfgm.apis import read_config
from mmfgm.engine import FlowRunner, SingleDeviceStrategy
from mmfgm.errors import UsageError
from mmfgm.models import FGM, FlowMatching, read_state_dict
from tests.conftest import NETWORK, train
from tests.test_engine.test_parallel import FSDP2, OPTIONS, TOLERANCE
from tests.test_engine.test_resume import assert_same, final

DENSITY = dict(type='LogitNormal', low=0.02)
RECOMPUTED = dict(
    type='SiT',
    latent_size=8,
    in_channels=1,
    width=16,
    depth=2,
    num_heads=2,
    num_classes=10,
    checkpointing=True,
)
SHARED = 'train_cfg.share_velocity=True'
SAME_DENSITY = (
    'model.fm_time_sampler.mean=0.5',
    'model.fm_time_sampler.std=1.2',
    'model.fgm_time_sampler.mean=0.5',
    'model.fgm_time_sampler.std=1.2',
)


def made(network=NETWORK, **options):
    torch.manual_seed(0)
    model = FGM(
        network=network,
        teacher=dict(checkpoint=None),
        fm_time_sampler=DENSITY,
        fgm_time_sampler=DENSITY,
        ema=dict(),
        **options,
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.double()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    'options',
    [
        dict(loss=dict(type='FGMLoss', l1_weight=1.0)),
        dict(loss=dict(type='DMDLoss')),
        dict(loss=dict(type='DiffInstructLoss')),
        dict(generator=dict(type='FewStepGenerator', times=3)),
        dict(network=RECOMPUTED),
        dict(
            online_guidance=dict(
                type='ClassifierFreeGuidance', scale=2.0, null=dict(type='NullLabel', label=9)
            )
        ),
    ],
    ids=['FGM', 'DMD', 'Diff-Instruct', 'few steps', 'recomputation', 'long and short guidance'],
)
def test_gradients_are_those_of_separate_evaluations(options):
    """On the same samples, noise and times, in float64."""
    model = made(**options)
    batch = dict(idx=torch.arange(6), cond=dict(labels=torch.arange(6)))
    samples = model.prepare(batch, differentiable=True)
    samples = {k: v.double() if k == 'x_0' else v for k, v in samples.items()}

    torch.manual_seed(1)
    joint = model.joint_loss(samples)
    assert list(joint) == ['generator', 'online']
    for phase, losses in joint.items():
        total = sum(value for name, value in losses.items() if 'loss' in name)
        inputs = list(getattr(model, phase).parameters())
        total.backward(inputs=inputs, retain_graph=True)
    shared = gradients(model)

    values = {}
    strategy = SingleDeviceStrategy()
    for phase, spec in model.phases.items():
        torch.manual_seed(1)
        with strategy.frozen([getattr(model, name) for name in spec.freezes]):
            values[phase] = model.loss(phase, samples)
            total = sum(value for name, value in values[phase].items() if 'loss' in name)
            total.backward(retain_graph=True)
    separate = gradients(model)
    assert shared.keys() == separate.keys()
    for name, grad in separate.items():
        torch.testing.assert_close(shared[name], grad, rtol=1e-9, atol=1e-12)
    for phase, losses in joint.items():
        for name, value in losses.items():
            torch.testing.assert_close(value, values[phase][name])


def test_the_online_network_is_called_once(tiny, tmp_path):
    """And what each phase leaves in the log stays what it was."""
    calls = {}
    for share in (False, True):
        cfg = read_config(str(tiny / 'fgm.py'))
        cfg.work_dir, cfg.launcher, cfg.evaluations = str(tmp_path / str(share)), 'none', {}
        cfg.experiment_name = f'{tmp_path.name}_{share}'
        cfg.train_cfg.update(max_iters=1, accumulation=2, share_velocity=share)
        cfg.model.fm_time_sampler = cfg.model.fgm_time_sampler = dict(type='Uniform')
        del cfg.default_hooks.checkpoint.save_best
        runner = FlowRunner.from_cfg(cfg)
        runner.prepare()
        counts = calls[share] = dict(online=0, generator=0)
        for name in counts:
            getattr(runner.model, name).register_forward_hook(
                lambda *args, name=name, counts=counts: counts.update({name: counts[name] + 1})
            )
        runner.train()
        assert {key.split('/')[0] for key in runner.train_loop.record.values} == {
            'online',
            'generator',
        }
        assert runner.train_loop.batches_per_iter == (2 if share else 4)
        assert set(runner.train_loop.record.marks) == {'online', 'generator'}
    assert calls == {
        False: dict(online=4, generator=4),
        True: dict(online=2, generator=2),
    }


@pytest.fixture(scope='module')
def one_process(tiny, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('shared')
    train(tiny / 'fgm.py', work_dir, *OPTIONS, *SAME_DENSITY, SHARED, 'train_cfg.accumulation=2')
    return work_dir


@pytest.mark.slow
def test_two_processes_equal_one(one_process, tiny, tmp_path):
    options = ('train_cfg.accumulation=2', 'train_dataloader.batch_size=4')
    train(tiny / 'fgm.py', tmp_path, *OPTIONS, *SAME_DENSITY, SHARED, *options, nproc=2)
    expected, found = (read_state_dict(str(folder)) for folder in (one_process, tmp_path))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **TOLERANCE)


@pytest.mark.slow
def test_fsdp2_is_refused(tiny, tmp_path):
    """It reshards and reduces once for each forward, so the second gradient would be wrong."""
    options = (*SAME_DENSITY, SHARED, *FSDP2)
    result = train(tiny / 'fgm.py', tmp_path, *options, nproc=2, codes=(1, 2))
    assert 'found FSDP2Strategy, which frees them' in result.stderr
    assert 'strategy.type=DDPStrategy' in result.stderr


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted(tiny, tmp_path):
    options = (*SAME_DENSITY, SHARED, 'train_cfg.online_updates=2')
    kill = [f'default_hooks.test.{each}' for each in ('type=KillHook', 'at=5', 'when=before')]
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    train(tiny / 'fgm.py', whole, *options)
    train(tiny / 'fgm.py', killed, *options, *kill, codes=None)
    assert not (killed / 'iter_8.pth').exists()
    train(tiny / 'fgm.py', killed, *options, resume=True)
    for found, expected in zip(final(killed), final(whole)):
        assert_same(found, expected)


def test_what_cannot_share():
    model = made()
    model.check_joint()
    other = FGM(
        network=NETWORK,
        teacher=dict(checkpoint=None),
        fm_time_sampler=dict(type='LogitNormal', mean=0.5),
        fgm_time_sampler=DENSITY,
        online_loss=dict(type='FlowMatchingLoss'),
    )
    with pytest.raises(UsageError, match='one density of t .* set share_velocity=False'):
        other.check_joint()
    with pytest.raises(UsageError, match='loss on real samples, found'):
        made(online_loss=dict(type='RealUIDOnlineLoss', alpha=0.9, beta=0.9)).check_joint()
    single = FlowMatching(network=NETWORK, time_sampler=DENSITY)
    with pytest.raises(UsageError, match='phases can share a velocity, found FlowMatching'):
        single.check_joint()
