# Copyright (c) mmfgm authors.
"""Tiny problems that train in seconds, and ways to run the tools as a user would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
# the tests compare runs on the CPU, with more processes than a machine has GPUs
os.environ['CUDA_VISIBLE_DEVICES'] = ''

# seconds after which a process counts as hung. The slowest (torch.compile) takes two minutes alone,
# and other work on the machine must not make it fail. A test, which may start several, gets twice
# that (--timeout in setup.cfg).
LIMIT = 1800

NETWORK = dict(
    type='AdaLNMLP', event_shape=(1, 8, 8), width=16, depth=2, embed_dim=16, num_classes=10
)


def tool_env(**extra):
    """An environment for a subprocess: one thread a process, nothing inherited from a launcher."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT')
    }
    return {**env, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **extra}


def run_module(module, *args, nproc=0, cwd=ROOT, codes=(0,), env=None, timeout=LIMIT):
    """Run ``python -m module args``, under torchrun with ``nproc`` processes if that is
    positive."""
    command = [sys.executable, '-m']
    if nproc:
        command += ['torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}', '-m']
    command += [module, *map(str, args)]
    result = subprocess.run(
        command, cwd=cwd, env=env or tool_env(), capture_output=True, text=True, timeout=timeout
    )
    if codes is not None and result.returncode not in codes:
        pytest.fail(
            f'{" ".join(command)} exited with'
            f' {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}'
        )
    return result


def train(config, work_dir, *options, nproc=0, resume=False, extra=(), **kwargs):
    """Run the training tool; ``options`` are config overrides ``key=value``,
    ``extra`` its other arguments."""
    args = [config, '--work-dir', work_dir, *extra]
    if resume:
        args += ['--resume'] if resume is True else ['--resume', resume]
    args += ['--launcher', 'pytorch'] if nproc else []
    args += ['--cfg-options', *options] if options else []
    return run_module('mmfgm.tools.train', *args, nproc=nproc, **kwargs)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def started(*args, lines, word='Iter(train)', cwd=ROOT):
    """A process that runs, after so many of the lines that it prints had ``word`` in them."""
    process = subprocess.Popen(
        [*map(str, args)],
        cwd=cwd,
        env=tool_env(PYTHON=sys.executable, PORT=str(free_port())),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        lines -= word in line
        if lines <= 0:
            return process
    pytest.fail(''.join(seen)[-4000:])


def pytest_addoption(parser):
    parser.addoption(
        '--kills', type=int, default=1, help='how often test_resume kills each run (default: 1)'
    )


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """A folder with a tiny teacher config, its trained checkpoint, and a tiny FGM config that uses
    it."""
    folder = tmp_path_factory.mktemp('tiny')
    (folder / 'teacher.py').write_text(f"""
_base_ = [{str(ROOT / 'configs/reflow/digits.py')!r}]
model = dict(network=dict(width=16, depth=2, embed_dim=16))
train_cfg = dict(max_iters=30)
train_dataloader = dict(batch_size=8)
evaluations = dict(fd=dict(interval=0, dataset=dict(num_samples=40), batch_size=16))
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=30), samples=dict(interval=1000)
)
""")
    (folder / 'fgm.py').write_text(f"""
_base_ = [{str(ROOT / 'configs/fgm/digits.py')!r}]
model = dict(
    network=dict(width=16, depth=2, embed_dim=16),
    teacher=dict(checkpoint={str(folder / 'teacher_run')!r}),
)
train_cfg = dict(max_iters=8)
train_dataloader = dict(batch_size=8)
evaluations = dict(fd=dict(interval=4, dataset=dict(num_samples=40), batch_size=16))
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=2), samples=dict(interval=1000)
)
custom_imports = dict(imports=['tests.helpers'])
""")
    train(folder / 'teacher.py', folder / 'teacher_run')
    return folder
