# Copyright (c) mmfgm authors.
"""One run at a time in a work dir; processes end with their launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mmfgm.errors import UsageError
from mmfgm.locks import LOCK, locked, start_of
from mmfgm.models import latest_checkpoint
from tests.conftest import LIMIT, ROOT, started, tool_env, train

HOLD = """
import sys, time
from mmfgm.locks import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    sys.stdin.read()
"""


def hold(folder):
    """A process that has the lock of a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(folder)],
        env=tool_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'held\n'
    return process


def gone(pid):
    """Wait until a process has ended."""
    deadline = time.monotonic() + LIMIT
    while start_of(pid) is not None:
        assert time.monotonic() < deadline, f'process {pid} still runs'
        time.sleep(0.02)


def test_the_holder_is_named_and_a_killed_one_is_stale_at_once(tmp_path):
    process = hold(tmp_path)
    with pytest.raises(UsageError) as refused, locked(str(tmp_path)):
        pass
    holder = json.loads((tmp_path / LOCK).read_text())
    for word in (str(process.pid), socket.gethostname(), holder['started'], '--work-dir'):
        assert word in str(refused.value)
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).exists()
    with locked(str(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())['pid'] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_it_is_released_at_the_end(tmp_path):
    process = hold(tmp_path)
    process.communicate('', timeout=LIMIT)
    assert not (tmp_path / LOCK).exists()
    with pytest.raises(ZeroDivisionError), locked(str(tmp_path)):
        raise ZeroDivisionError
    assert not (tmp_path / LOCK).exists()


def left(folder, **changes):
    """A lock file that nobody's kernel lock stands behind."""
    holder = dict(
        host=socket.gethostname(),
        pid=os.getppid(),
        ticks=start_of(os.getppid()),
        started='2026-01-01 00:00:00',
    )
    (folder / LOCK).write_text(json.dumps({**holder, **changes}))


def test_a_file_of_this_machine_is_stale_by_pid_or_by_start(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    for changes in (dict(pid=ended.pid), dict(ticks=start_of(os.getppid()) - 1)):
        left(tmp_path, **changes)
        with locked(str(tmp_path)):
            pass
    # a process that runs, where the file system carries no locks
    left(tmp_path)
    with pytest.raises(UsageError, match=f'process {os.getppid()} '), locked(str(tmp_path)):
        pass


def test_a_file_of_another_machine_says_how_to_remove_it(tmp_path):
    left(tmp_path, host='elsewhere')
    with pytest.raises(UsageError) as refused, locked(str(tmp_path)):
        pass
    assert 'on elsewhere' in str(refused.value)
    assert f'remove {str(tmp_path / LOCK)!r}' in str(refused.value)
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).unlink()
    with locked(str(tmp_path)):
        pass


@pytest.mark.parametrize('content', ['', '[]', '{"host": 1}', '[' * 4000, '\x00' * 90])
def test_a_file_that_names_nobody_is_stale(content, tmp_path):
    (tmp_path / LOCK).write_text(content)
    with locked(str(tmp_path)):
        pass


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    """Over a stale file, which all of them find at the same moment."""
    left(tmp_path, ticks=1)
    code = """
import sys
from mmfgm.errors import UsageError
from mmfgm.locks import locked
try:
    with locked(sys.argv[1]):
        print('held', flush=True)
        sys.stdin.read()
except UsageError:
    print('refused', flush=True)
    sys.stdin.read()
"""
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code, str(tmp_path)],
            env=tool_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    said = [process.stdout.readline() for process in processes]
    for process in processes:
        process.communicate('', timeout=LIMIT)
    assert sorted(said) == ['held\n'] + ['refused\n'] * 5


LINKED = dict(
    launched="""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', '''
import os, time
from mmfgm.processes import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(3600)
'''], start_new_session=True)
child.wait()
""",
    apart="""
from mmfgm.processes import run_apart
run_apart(exec, 'import os, time; print(os.getpid(), flush=True); time.sleep(3600)')
""",
)


@pytest.mark.parametrize('way', LINKED)
def test_a_killed_parent_takes_its_process_along(way):
    parent = subprocess.Popen(
        [sys.executable, '-c', LINKED[way]], env=tool_env(), stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    assert pid != parent.pid and start_of(pid) is not None
    parent.kill()
    parent.wait()
    gone(pid)


ENDLESS = (
    '--cfg-options',
    'train_cfg.max_iters=100000',
    'default_hooks.checkpoint.interval=2',
    'evaluations.fd.interval=0',
)


def go_on(tiny, work_dir, nproc=0):
    """Resume, for two more iterations than there are."""
    iteration = int(latest_checkpoint(str(work_dir)).split('_')[-1].split('.')[0])
    options = (f'train_cfg.max_iters={iteration + 2}', 'evaluations.fd.interval=0')
    train(tiny / 'fgm.py', work_dir, *options, resume=True, nproc=nproc)


@pytest.mark.slow
def test_a_second_run_is_refused_by_name(tiny, tmp_path):
    first = started(
        sys.executable,
        '-m',
        'mmfgm.tools.train',
        tiny / 'fgm.py',
        '--work-dir',
        tmp_path,
        *ENDLESS,
        lines=3,
    )
    before = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    second = train(tiny / 'fgm.py', tmp_path, resume=True, codes=(2,))
    assert f'process {first.pid} on {socket.gethostname()}' in second.stderr
    assert 'Traceback' not in second.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == before
    first.kill()
    first.communicate(timeout=LIMIT)
    assert (tmp_path / LOCK).exists()
    go_on(tiny, tmp_path)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_workers_along(tiny, tmp_path):
    """It was SIGKILLed, and its workers trained on beside the next run."""
    launcher = started(
        'bash',
        ROOT / 'tools/dist_train.sh',
        tiny / 'fgm.py',
        2,
        '--work-dir',
        tmp_path,
        *ENDLESS,
        lines=3,
    )
    children = f'/proc/{launcher.pid}/task/{launcher.pid}/children'
    with open(children) as f:
        workers = [int(pid) for pid in f.read().split()]
    assert len(workers) >= 2
    second = train(tiny / 'fgm.py', tmp_path, resume=True, nproc=2, codes=(1,))
    assert f'process {json.loads((tmp_path / LOCK).read_text())["pid"]} on' in second.stderr
    os.kill(launcher.pid, signal.SIGKILL)
    for worker in workers:
        gone(worker)
    launcher.communicate(timeout=LIMIT)
    go_on(tiny, tmp_path, nproc=2)
    assert not (tmp_path / LOCK).exists()
