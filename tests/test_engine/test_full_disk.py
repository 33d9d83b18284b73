# Copyright (c) mmfgm authors.
"""A disk that fills up, or a work dir that goes, while a run writes."""

import errno
import os
import shutil
import sys
import threading

import pytest

from mmfgm.errors import UsageError
from mmfgm.files import disk_errors
from mmfgm.models import latest_checkpoint
from tests.conftest import run_module, train
from tests.test_engine.test_resume import hook_options

FSDP2 = ('strategy.type=FSDP2Strategy', 'strategy.block_types=AdaLNBlock,')


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_system_is_quoted_whatever_a_library_makes_of_it(tmp_path):
    with pytest.raises(UsageError, match='No space left on device; make room, then go on'):
        with disk_errors(str(tmp_path), 'go on'):
            try:
                full()
            finally:
                raise RuntimeError('unexpected pos 704 vs 598')
    with pytest.raises(ZeroDivisionError), disk_errors(str(tmp_path), 'go on'):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match='something else'), disk_errors(str(tmp_path), 'go on'):
        raise RuntimeError('something else')
    with pytest.raises(UsageError, match='was deleted'), disk_errors(str(tmp_path), 'go on'):
        shutil.rmtree(tmp_path)
        open(tmp_path / 'file', 'w')
    # it never was there: what is wrong is something else
    with pytest.raises(FileNotFoundError), disk_errors(str(tmp_path), 'go on'):
        open(tmp_path / 'file', 'w')


def test_a_thread_that_cannot_write_says_so_in_one_line(tmp_path, capsys):
    def run(target):
        with disk_errors(str(tmp_path), 'go on'):
            thread = threading.Thread(target=target, name='writer')
            thread.start()
            thread.join()
        return capsys.readouterr().err

    assert run(full) == 'writer stopped: [Errno 28] No space left on device\n'
    usual = threading.excepthook
    threading.excepthook = lambda args: print(args.exc_type.__name__, file=sys.stderr)
    try:
        assert run(lambda: 1 / 0) == 'ZeroDivisionError\n'
    finally:
        threading.excepthook = usual


@pytest.mark.slow
@pytest.mark.parametrize(
    'nproc, options',
    [(0, ()), (2, FSDP2)],
    ids=['1 process', 'FSDP2'],
)
def test_a_full_disk_says_make_room_and_the_run_goes_on(nproc, options, tiny, tmp_path):
    short = (*options, 'train_cfg.max_iters=6', 'evaluations.fd.interval=0')
    hook = hook_options(type='DiskHook', at=4)
    result = train(tiny / 'fgm.py', tmp_path, *short, *hook, nproc=nproc, codes=(2, 1))
    assert result.stderr.count('make room, then go on with --resume') == 1, result.stderr
    assert nproc or 'Traceback' not in result.stderr
    assert 'Logging error' not in result.stderr
    assert not list(tmp_path.glob('*.tmp')) and not list(tmp_path.glob('iter_4*'))
    assert latest_checkpoint(str(tmp_path)).endswith('iter_2.pth')
    train(tiny / 'fgm.py', tmp_path, *short, nproc=nproc, resume=True)
    assert latest_checkpoint(str(tmp_path)).endswith('iter_6.pth')


@pytest.mark.slow
def test_a_deleted_work_dir_is_one_message(tiny, tmp_path):
    hook = hook_options(type='DiskHook', at=4, deleted=True)
    result = train(
        tiny / 'fgm.py', tmp_path / 'run', *hook, 'evaluations.fd.interval=0', codes=(2,)
    )
    assert 'was deleted or unmounted while' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.slow
def test_a_full_disk_in_test_is_one_message(tiny, tmp_path):
    code = (
        'import resource, sys; from mmfgm.tools.test import main;'
        ' resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); main(sys.argv[1:])'
    )
    (tmp_path / 'limited.py').write_text(code)
    result = run_module(
        'limited', tiny / 'fgm.py', '--work-dir', tmp_path, '--network', 'teacher', '--nfe', '1',
        cwd=tmp_path, codes=(2,),
    )  # fmt: skip
    assert result.stderr.count('make room') == 1 and 'Traceback' not in result.stderr
