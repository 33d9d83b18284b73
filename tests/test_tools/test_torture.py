# Copyright (c) mmfgm authors.
"""Runs of a config under faults, on tiny problems and on one that does not hold."""

import os
import random
import signal
import sys
import threading
import time

import pytest
import torch

from mmfgm.apis.faults import Torture, descendants, first_difference
from mmfgm.tools.torture import jump
from tests.conftest import run_module, started, train

# a run that saves how often it was started
STARTS = """
import os, sys, time, torch
(work_dir,) = sys.argv[1:]
os.makedirs(work_dir, exist_ok=True)
with open(work_dir + '/starts', 'a') as f:
    f.write('x')
print('Checkpoints will be saved', flush=True)
time.sleep(1)
value = os.path.getsize(work_dir + '/starts')
hub = dict(log_scalars={})
state = dict(w=torch.tensor(float(value)))
torch.save(dict(state_dict=state, message_hub=hub), work_dir + '/iter_1.pth')
with open(work_dir + '/last_checkpoint', 'w') as f:
    f.write('iter_1.pth')
"""


def test_the_first_difference_is_named():
    value = dict(a=[1.0, torch.tensor([0.0, float('nan')])], b=('x', None, float('nan')))
    same = dict(a=[1.0, torch.tensor([0.0, float('nan')])], b=('x', None, float('nan')))
    assert first_difference(value, same) is None
    same['a'][1][0] = -0.0  # equal, but not to the last bit
    assert first_difference(value, same) == 'a.1'
    assert first_difference(dict(a=1), dict(a=1.0)) == 'a'
    assert first_difference(dict(a=1), dict(b=1)) == ' (keys)'
    assert first_difference([torch.zeros(1)], [torch.zeros(1).double()]) == '0'


def test_descendants_are_found(tmp_path):
    code = 'import subprocess, sys; print("up", flush=True); subprocess.run(["sleep", "3600"])'
    process = started(sys.executable, '-c', code, lines=1, word='up')
    while not descendants(process.pid):
        time.sleep(0.01)
    (child,) = descendants(process.pid)
    assert descendants(child) == []
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_jumping_clock_leaves_the_training_its_random_numbers(monkeypatch):
    monkeypatch.setattr(time, 'time', time.time)
    monkeypatch.setattr(time, 'localtime', time.localtime)
    naps = []
    monkeypatch.setattr(time, 'sleep', naps.append)
    before, real = random.getstate(), time.time()
    jump(86400.0)
    for thread in threading.enumerate():
        if thread.name.endswith('(move)'):
            thread.join()
    assert len(naps) == 4 and random.getstate() == before
    assert time.time() - real >= 86400


def test_a_run_that_parts_is_named(tmp_path):
    (tmp_path / 'run.py').write_text(STARTS)

    def command(work_dir, clock):
        return [sys.executable, str(tmp_path / 'run.py'), work_dir]

    parted = Torture(str(tmp_path / 'torture'), command, kinds=['all']).run(60, faults=1)
    assert parted is not None and 'the run parted at state_dict.w' in parted


@pytest.mark.slow
def test_a_training_holds(tiny, tmp_path):
    train(tiny / 'fgm.py', tmp_path, 'train_cfg.max_iters=1')
    result = run_module(
        'mmfgm.tools.torture', tmp_path, '--faults', 2, '--iterations', 16,
        '--kinds', 'all', 'disk', 'clock',
    )  # fmt: skip
    assert ' faults, all bit for bit' in result.stdout, result.stdout
