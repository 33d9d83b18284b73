# Copyright (c) mmfgm authors.
"""A config that changed between a run and its resuming."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper

from mmfgm.engine.resuming import APPLIED, REFUSED, WARNED, changes, reschedule, settings
from mmfgm.engine.runner import FlowRunner
from mmfgm.models import choose_precision, latest_checkpoint, read_state_dict
from mmfgm.models.weights import read_pickle
from tests.conftest import train
from tests.test_engine.test_resume import assert_same, hook_options


def test_each_kind_of_change_has_its_rule():
    old = dict(
        optim_wrapper=dict(generator=dict(optimizer=dict(type='Adam', lr=1.0, betas=(0.0, 0.9)))),
        param_scheduler=dict(generator=[dict(type='LinearLR', end_factor=0.1)]),
        train_cfg=dict(max_iters=4),
        train_dataloader=dict(batch_size=8, num_workers=0, dataset=dict(type='A', path='a')),
        model=dict(
            loss=dict(l1_weight=0.0),
            generator=dict(t_star=0.8),
            ema=dict(generator_ema=0.9),
            network=dict(num_classes=10),
            teacher=dict(checkpoint='a'),
        ),
        strategy=dict(precision='fp32'),
        work_dir='a',
        evaluations=dict(fd=dict(interval=1)),
    )
    new = dict(
        optim_wrapper=dict(generator=dict(optimizer=dict(type='SGD', lr=2.0, betas=(0.5, 0.9)))),
        param_scheduler=dict(generator=[dict(type='LinearLR', end_factor=0.2)]),
        # one that is written out, and one that is not what it was by default
        train_cfg=dict(max_iters=8, share_samples=False, accumulation=2, online_updates=1),
        train_dataloader=dict(batch_size=9, num_workers=2, dataset=dict(type='B', path='b')),
        model=dict(
            loss=dict(l1_weight=1.0),
            generator=dict(t_star=0.9),
            ema=dict(generator_ema=0.8),
            network=dict(num_classes=9),
            teacher=dict(checkpoint='b'),
        ),
        strategy=dict(precision='bf16'),
        work_dir='b',
        evaluations=dict(),
    )
    assert {change.name: change.rule for change in changes(old, new)} == {
        'optim_wrapper.generator.optimizer.lr': APPLIED,
        'optim_wrapper.generator.optimizer.betas.0': APPLIED,
        'optim_wrapper.generator.optimizer.type': REFUSED,
        'param_scheduler.generator.0.end_factor': APPLIED,
        'train_cfg.max_iters': WARNED,
        'train_cfg.accumulation': REFUSED,
        'train_dataloader.batch_size': REFUSED,
        'train_dataloader.dataset.type': REFUSED,
        'train_dataloader.dataset.path': WARNED,
        'model.loss.l1_weight': REFUSED,
        'model.generator.t_star': REFUSED,
        'model.ema.generator_ema': REFUSED,
        'model.network.num_classes': REFUSED,
        'strategy.precision': WARNED,
    }
    assert not list(changes(old, old))


def built(lr):
    """An optimizer with two schedules, one after the other."""
    wrapper = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr))
    schedulers = [
        LinearLR(wrapper, start_factor=0.1, by_epoch=False, end=3),
        CosineAnnealingLR(wrapper, T_max=9, eta_min=0.01, by_epoch=False, begin=3),
    ]
    return dict(network=wrapper), dict(network=schedulers)


def test_schedules_are_brought_to_where_the_run_would_be():
    """To the last bit, also those that are no multiple of the base rate."""
    wrappers, schedulers = built(0.5)
    for _ in range(7):
        for scheduler in schedulers['network']:
            scheduler.step()
    others, others_schedulers = built(0.5)
    fresh = settings(others)
    # what loading the state of a run with another rate leaves
    others['network'].optimizer.param_groups[0].update(lr=99.0, initial_lr=99.0)
    reschedule(others, others_schedulers, fresh, 7)
    assert settings(others) == settings(wrappers)
    for mine, theirs in zip(others_schedulers['network'], schedulers['network']):
        assert mine.state_dict() == theirs.state_dict()


def sharded_history(work_dir):
    hub = read_pickle(latest_checkpoint(str(work_dir)) + '/extras.pth')['message_hub']
    return {key: value[0] for key, value in hub['log_scalars'].items()}


@pytest.mark.parametrize(
    'batch_size, accumulation, processes, rule',
    [(8, 1, 1, WARNED), (2, 2, 2, WARNED), (8, 1, 2, REFUSED), (4, 2, 2, REFUSED)],
)
def test_as_many_samples_an_update_are_no_other_run(batch_size, accumulation, processes, rule):
    """Resuming on another number of processes keeps their product: 4 x 1 x 2 here."""

    def side(batch_size, accumulation):
        return dict(
            train_dataloader=dict(batch_size=batch_size),
            train_cfg=dict(accumulation=accumulation),
        )

    found = list(changes(side(4, 1), side(batch_size, accumulation), (2, processes)))
    assert found and {change.rule for change in found} == {rule}


@pytest.mark.slow
def test_another_resolved_precision_is_warned_about(tiny, tmp_path):
    """A config that says 'auto' on both machines hides what they made of it: checkpoints say it."""
    chosen, _ = choose_precision('cpu')
    other = dict(bf16='fp32', fp32='bf16')[chosen]
    train(tiny / 'fgm.py', tmp_path, f'strategy.precision={other}', 'train_cfg.max_iters=2')
    meta = read_pickle(latest_checkpoint(str(tmp_path)))['meta']
    assert meta['precision'] == other
    result = train(tiny / 'fgm.py', tmp_path, 'strategy.precision=auto', resume=True)
    text = result.stdout + result.stderr
    assert f"strategy.precision='auto' is {chosen} here" in text
    assert f'Changed since the checkpoint: strategy.precision: {other} -> {chosen}' in text


@pytest.mark.parametrize(
    'before, configured, now, warned',
    [
        ('bf16', 'auto', 'bf16', None),
        ('bf16', 'auto', 'fp32', 'bf16 -> fp32'),
        # a checkpoint from before there was an entry for it
        (None, 'bf16', 'fp32', 'bf16 -> fp32'),
        (None, None, 'fp32', None),
        (None, None, 'bf16', 'fp32 -> bf16'),
    ],
)
def test_precisions_are_compared_as_they_were_resolved(before, configured, now, warned):
    old = Config(dict(strategy=dict(precision=configured)) if configured else dict())
    said = []
    runner = SimpleNamespace(
        cfg=Config(dict(strategy=dict(precision='auto'))),
        strategy=SimpleNamespace(precision=now),
        logger=SimpleNamespace(warning=said.append),
        allow_changes=False,
        param_schedulers=None,
    )
    meta = dict(cfg=old.pretty_text, iter=1, **({'precision': before} if before else {}))
    FlowRunner._compare_config(runner, 'a.pth', meta)
    assert len(said) == (warned is not None)
    assert warned is None or f'strategy.precision: {warned}' in said[0]


@pytest.mark.slow
def test_a_changed_learning_rate_is_applied_and_said(tiny, tmp_path):
    """The rate of the checkpoint was kept without a word, although exit code 3 advises the
    change. Sharded, where optimizers have states of another form."""
    options = (
        'strategy.type=FSDP2Strategy',
        'strategy.block_types=AdaLNBlock,',
        'evaluations.fd.interval=0',
        'default_hooks.checkpoint.interval=4',
    )
    lower = 'optim_wrapper.generator.optimizer.lr=1e-3'
    stop = hook_options(type='KillHook', at=5, when='before')
    train(tiny / 'fgm.py', tmp_path, *options, *stop, nproc=2, codes=None)
    result = train(tiny / 'fgm.py', tmp_path, *options, lower, nproc=2, resume=True)
    text = result.stdout + result.stderr
    assert 'optim_wrapper.generator.optimizer.lr: 0.002 -> 0.001' in text
    assert 'optim_wrapper.online' not in text.split('Changed since the checkpoint')[-1]
    # it falls from the base to 0 over 8 iterations, as if it had begun with the lower one
    history = sharded_history(tmp_path)
    base = torch.tensor([2e-3] * 4 + [1e-3] * 4, dtype=torch.float64)
    expected = base * (1 - torch.arange(8, dtype=torch.float64) / 7)
    key = next(key for key in history if key.endswith('generator.lr'))
    assert torch.allclose(history[key], expected, atol=1e-9), history[key]


@pytest.mark.slow
def test_another_run_is_refused_by_name_and_one_flag_insists(tiny, tmp_path):
    train(tiny / 'fgm.py', tmp_path, 'train_cfg.max_iters=4', 'evaluations.fd.interval=0')
    before = read_state_dict(str(tmp_path))
    other = (
        'model.loss.l1_weight=1.0',
        'model.ema.generator_ema=0.9',
        'train_dataloader.batch_size=4',
        'train_cfg.max_iters=6',
        'evaluations.fd.interval=0',
    )
    result = train(tiny / 'fgm.py', tmp_path, *other, resume=True, codes=(2,))
    message = result.stderr.split('error: ')[-1]
    for change in (
        'model.loss.l1_weight: 0.0 -> 1.0',
        'model.ema.generator_ema: 0.995 -> 0.9',
        'train_dataloader.batch_size: 8 -> 4',
        '--allow-changes',
    ):
        assert change in message
    assert 'Traceback' not in result.stderr
    assert_same(read_state_dict(str(tmp_path)), before)
    # a stranger's checkpoint: MMEngine would run the config in its meta on resume, as Python
    checkpoint, ran = tmp_path / 'iter_4.pth', tmp_path / 'ran'
    content = torch.load(checkpoint, weights_only=False)
    content['meta']['config'] = f'open({str(ran)!r}, "w")'
    torch.save({**content, 'checksums': None}, checkpoint)
    result = train(tiny / 'fgm.py', tmp_path, *other, resume=True, extra=('--allow-changes',))
    assert not ran.exists()
    text = result.stdout + result.stderr
    assert 'model.loss.l1_weight: 0.0 -> 1.0' in text
    assert 'had finished its 4 iterations' in text
    assert latest_checkpoint(str(tmp_path)).endswith('iter_6.pth')
