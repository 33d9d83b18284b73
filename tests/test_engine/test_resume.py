# Copyright (c) mmfgm authors.
"""Killed and resumed equals uninterrupted, bit for bit. ``--kills 20`` asks for 20 kills of each
run."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmfgm.models import latest_checkpoint, read_state_dict
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
