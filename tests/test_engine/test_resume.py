# Copyright (c) mmfgm authors.
"""Killed and resumed equals uninterrupted, bit for bit. ``--kills 20`` asks for 20 kills of each
run."""

import random
import signal
import subprocess
import sys
import time
from threading import Event
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from mmfgm.engine.checkpoint import BackgroundSaver
from mmfgm.errors import UsageError
from mmfgm.models import EXTRAS, latest_checkpoint, read_state_dict
from mmfgm.models.weights import read_pickle
from tests.conftest import LIMIT, ROOT, run_module, tool_env, train

ITERS = 8


def assert_same(a, b, path=''):
    """Equal to the last bit, through nested containers."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{path}/{i}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def hook_options(**cfg):
    return [f'default_hooks.test.{key}={value}' for key, value in cfg.items()]


def after(event, function):
    """``function``, once ``event`` is set."""

    def waiting(*args, **kwargs):
        assert event.wait(LIMIT)
        return function(*args, **kwargs)

    return waiting


def final(work_dir):
    checkpoint = read_pickle(latest_checkpoint(str(work_dir)))
    history = {
        key: value[0]
        for key, value in checkpoint['message_hub']['log_scalars'].items()
        if not any(word in key for word in ('time', 'second'))
    }
    return {
        key: checkpoint[key] for key in ('state_dict', 'optimizer', 'param_schedulers', 'rng')
    }, history


@pytest.mark.slow
@pytest.mark.parametrize(
    'nproc, share',
    [(0, False), (0, True), (2, False)],
    ids=['1 process', 'shared samples', '2 processes'],
)
def test_killed_and_resumed_equals_uninterrupted(nproc, share, tiny, tmp_path, request):
    options = (
        'optim_wrapper.online.clip_grad.max_norm=0.2',
        f'train_cfg.share_samples={share}',
        f'train_cfg.accumulation={1 if share else 2}',
        'train_cfg.online_updates=2',
    )
    train(tiny / 'fgm.py', tmp_path / 'whole', *options, nproc=nproc)
    rng = random.Random(f'{nproc}{share}')
    for kill in range(request.config.getoption('--kills')):
        work_dir = tmp_path / f'killed_{kill}'
        at, when = rng.randrange(3, ITERS), rng.choice(['before', 'while', 'after'])
        # 'while' needs an iteration that writes a checkpoint
        at = at - at % 2 if when == 'while' else at
        hook = hook_options(
            type='KillHook', at=at, when=when, rank=0 if when == 'while' else max(nproc - 1, 0)
        )
        train(tiny / 'fgm.py', work_dir, *options, *hook, nproc=nproc, codes=None)
        assert (
            latest_checkpoint(str(work_dir)) is not None
            and not (work_dir / f'iter_{ITERS}.pth').exists()
        )
        train(tiny / 'fgm.py', work_dir, *options, nproc=nproc, resume=True)
        (state, history), (expected, expected_history) = final(work_dir), final(tmp_path / 'whole')
        assert_same(state, expected)
        assert_same(history, expected_history)


@pytest.mark.slow
def test_sharded_run_resumes_exactly(tiny, tmp_path):
    """FSDP2 on 2 processes: 4 + 4 iterations equal 8."""
    options = (
        'strategy.type=FSDP2Strategy',
        'strategy.block_types=AdaLNBlock,',
        'default_hooks.checkpoint.interval=4',
    )
    train(tiny / 'fgm.py', tmp_path / 'whole', *options, nproc=2)
    hook = hook_options(type='KillHook', at=5, when='before', rank=1)
    train(tiny / 'fgm.py', tmp_path / 'parts', *options, *hook, nproc=2, codes=None)
    train(tiny / 'fgm.py', tmp_path / 'parts', *options, nproc=2, resume=True)
    assert_same(read_state_dict(str(tmp_path / 'parts')), read_state_dict(str(tmp_path / 'whole')))


@pytest.mark.slow
def test_killed_while_checkpoints_are_written_beside_the_training(tiny, tmp_path, request):
    """Each takes longer than the iterations between two, so a kill meets one half written."""
    options = (
        'strategy.type=FSDP2Strategy',
        'strategy.block_types=AdaLNBlock,',
        'default_hooks.checkpoint.interval=2',
        'default_hooks.checkpoint.max_keep_ckpts=1',
    )
    beside = ('strategy.async_checkpoints=True', 'default_hooks.slow.type=SlowDiskHook')
    train(tiny / 'fgm.py', tmp_path / 'whole', *options, nproc=2)
    expected = read_state_dict(str(tmp_path / 'whole'))
    rng, resumed = random.Random(0), []
    for kill in range(request.config.getoption('--kills')):
        work_dir = tmp_path / f'killed_{kill}'
        slow = f'default_hooks.slow.seconds={rng.uniform(0.01, 0.3)}'
        at, when = rng.randrange(4, ITERS), rng.choice(['before', 'while', 'after'])
        rank = 0 if when == 'while' else rng.randrange(2)
        hook = hook_options(type='KillHook', at=at, when=when, rank=rank)
        train(tiny / 'fgm.py', work_dir, *options, *beside, slow, *hook, nproc=2, codes=None)
        whole = latest_checkpoint(str(work_dir))
        resumed.append(whole)
        assert not (work_dir / f'iter_{ITERS}.pth').exists()
        result = train(
            tiny / 'fgm.py', work_dir, *options, *beside, slow, nproc=2, resume=whole is not None
        )
        assert_same(read_state_dict(str(work_dir)), expected)
        # nothing is left of what was half written, nor of what is out of date
        assert [path.name for path in work_dir.glob('iter_*')] == [f'iter_{ITERS}.pth']
        assert 'Traceback' not in result.stderr
    assert any(resumed)


def test_a_checkpoint_is_of_the_moment_at_which_it_was_asked_for(tmp_path):
    """The training changes the weights in place while they are written."""
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    try:
        saver, done, free = BackgroundSaver(), [], Event()
        weight, history = torch.arange(4.0), [1]
        extras = dict(meta=dict(history=history))
        with mock.patch('torch.distributed.checkpoint.save', after(free, dcp.save)):
            saver.save(dict(state_dict=dict(weight=weight)), extras, str(tmp_path / 'iter_1.pth'))
            saver.then(lambda: done.append(sorted(p.name for p in tmp_path.iterdir())))
            weight.zero_()
            history.append(2)
            assert not done
            free.set()
            saver.finish()
        # only the whole checkpoint is there when others hear of it
        assert done == [['iter_1.pth']]
        assert torch.equal(
            read_state_dict(str(tmp_path / 'iter_1.pth'))['weight'], torch.arange(4.0)
        )
        assert read_pickle(str(tmp_path / 'iter_1.pth' / EXTRAS))['meta']['history'] == [1]
        # what goes wrong is said where the training waits, and nobody hears of that checkpoint
        (tmp_path / 'file').touch()
        saver.save(dict(state_dict=dict(weight=weight)), {}, str(tmp_path / 'file/iter_2.pth'))
        saver.then(lambda: done.append(None))
        with pytest.raises((UsageError, RuntimeError, OSError)):
            saver.finish()
        assert len(done) == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_another_teacher_is_noticed(tiny, tmp_path):
    train(tiny / 'fgm.py', tmp_path / 'run', 'train_cfg.max_iters=2')
    weights = read_state_dict(str(tiny / 'teacher_run'))
    weights['network_ema.output.bias'] = weights['network_ema.output.bias'] + 1e-3
    torch.save(dict(state_dict=weights), tmp_path / 'other.pth')
    result = train(
        tiny / 'fgm.py',
        tmp_path / 'run',
        f'model.teacher.checkpoint={tmp_path / "other.pth"}',
        resume=True,
        codes=(2,),
    )
    assert 'another teacher' in result.stderr and 'Traceback' not in result.stderr
    best = next((tmp_path / 'run').glob('iter_2.pth'))
    stripped = read_pickle(str(best))
    del stripped['optimizer']
    torch.save(stripped, tmp_path / 'stripped.pth')
    result = run_module(
        'mmfgm.tools.train',
        tiny / 'fgm.py',
        '--work-dir',
        tmp_path / 'run',
        '--resume',
        tmp_path / 'stripped.pth',
        codes=(2,),
    )
    assert 'holds no optimizer state' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('nproc', [0, 2])
def test_sigterm_saves_and_exits_with_75(nproc, tiny, tmp_path):
    command = [sys.executable, '-m']
    command += (
        ['torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}', '-m']
        if nproc
        else []
    )
    command += [
        'mmfgm.tools.train',
        str(tiny / 'fgm.py'),
        '--work-dir',
        str(tmp_path),
        '--launcher',
        'pytorch' if nproc else 'none',
        '--cfg-options',
        'train_cfg.max_iters=100000',
        'default_hooks.checkpoint.interval=100000',
        'evaluations.fd.interval=0',
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=tool_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'Iter(train)' in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=LIMIT)
    text = ''.join(lines) + rest
    assert process.returncode == 75 if not nproc else process.returncode != 0, text
    saved = latest_checkpoint(str(tmp_path))
    assert saved is not None, text
    iteration = read_pickle(saved)['meta']['iter']
    assert f'stopped after iteration {iteration} ' in text
    # and it goes on from there
    result = train(
        tiny / 'fgm.py', tmp_path, f'train_cfg.max_iters={iteration + 2}', resume=True, nproc=nproc
    )
    assert f'resumed epoch: 0, iter: {iteration}' in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    'network, phase', [('online', 'online'), ('teacher', 'generator'), ('generator', 'online')]
)
def test_a_non_finite_value_stops_the_run(network, phase, tiny, tmp_path):
    """It names the iteration, the phase and the network, and keeps the last good checkpoint."""
    result = train(
        tiny / 'fgm.py',
        tmp_path,
        *hook_options(type='PoisonHook', at=6, network=network),
        codes=(3,),
    )
    assert f"iteration 6, phase '{phase}'" in result.stderr and 'Traceback' not in result.stderr
    assert f"'{network}'" in result.stderr.split('non-finite weights')[1]
    saved = latest_checkpoint(str(tmp_path))
    assert saved.endswith('iter_4.pth') and saved in result.stderr
    assert all(value.isfinite().all() for value in read_pickle(saved)['state_dict'].values())
    assert not (tmp_path / 'iter_6.pth').exists()
