# Copyright (c) mmfgm authors.
"""SIGTERM and Ctrl-C: real processes, real signals."""

import os
import signal
import sys

import pytest

from mmfgm.models import latest_checkpoint
from mmfgm.models.weights import read_pickle
from mmfgm.processes import StopSignals
from tests.conftest import LIMIT, started, train

ENDLESS = (
    'train_cfg.max_iters=100000',
    'default_hooks.checkpoint.interval=100000',
    'evaluations.fd.interval=0',
)
# an evaluation that takes minutes
SLOW = (
    'evaluations.fd.metrics.fd.feature.type=SlowPixels',
    'evaluations.fd.batch_size=1',
    'evaluations.fd.dataset.num_samples=3000',
)


def command(config, work_dir, *options, nproc=0):
    command = [sys.executable, '-m']
    if nproc:
        command += ['torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}', '-m']
    command += ['mmfgm.tools.train', config, '--work-dir', work_dir]
    return [*command, '--launcher', 'pytorch' if nproc else 'none', '--cfg-options', *options]


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    signals.begin()
    assert not signals.agreed()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.agreed() and signals.name == 'SIGTERM'
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.name == 'Ctrl-C' and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signals.end()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_75(tiny, tmp_path):
    """Of a terminal, which sends it to the loader's workers too."""
    loader = 'train_dataloader.num_workers=1'
    process = started(*command(tiny / 'fgm.py', tmp_path, *ENDLESS, loader), lines=2)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, text
    iteration = read_pickle(latest_checkpoint(str(tmp_path)))['meta']['iter']
    assert f'Ctrl-C: stopped after iteration {iteration} ' in text and 'Traceback' not in text


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path):
    # an iteration that takes minutes, so that the first one is not answered yet
    long = ('train_cfg.online_updates=100000', 'default_hooks.test.type=SayHook')
    process = started(*command(tiny / 'fgm.py', tmp_path, *ENDLESS, *long), lines=1, word='begins')
    process.send_signal(signal.SIGINT)
    text = ''
    while 'a second Ctrl-C' not in text:
        line = process.stdout.readline()
        assert line, text
        text += line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGINT and 'Traceback' not in text + rest


@pytest.mark.slow
def test_an_evaluation_is_interrupted_and_taken_up_again(tiny, tmp_path):
    """It was waited for: minutes, where a cluster grants seconds."""
    options = ('evaluations.fd.interval=2', 'train_cfg.max_iters=4')
    process = started(
        *command(tiny / 'fgm.py', tmp_path, *options, *SLOW, nproc=2),
        lines=4,
        word='measuring',
    )
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1  # the launcher's own
    assert 'SIGTERM: stopped in the evaluation fd, after ' in text
    assert latest_checkpoint(str(tmp_path)).endswith('iter_2.pth')
    result = train(tiny / 'fgm.py', tmp_path, *options, resume=True, nproc=2)
    text = result.stdout + result.stderr
    assert text.index('Evaluation at iteration 2') < text.index('Evaluation at iteration 4')


@pytest.mark.slow
def test_a_test_is_interrupted(tiny, tmp_path):
    options = ('--work-dir', tmp_path, '--network', 'teacher', '--nfe', '1', '--cfg-options')
    process = started(
        sys.executable, '-m', 'mmfgm.tools.test', tiny / 'fgm.py', *options, *SLOW,
        lines=4, word='measuring',
    )  # fmt: skip
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, text
    assert 'SIGTERM: stopped in the evaluation fd' in text and 'start the same command' in text
