# Copyright (c) mmfgm authors.
"""One run at a time in a work dir.

The lock is a file that names its holder, and the kernel's lock on that file. The kernel drops its
lock the moment a process ends, however it ends, and does not care about pids, so it also tells two
containers apart that share a host name. Not every network file system carries it to other machines:
there the name in the file decides.
"""

import errno
import json
import os
import os.path as osp
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmfgm.errors import UsageError

LOCK = 'run.lock'


def start_of(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None without one.

    With it a pid names one process, although the numbers come round again. Unlike a time of day it
    does not move with the clock. 0 stands for a process whose start the system does not tell.
    """
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as f:
            # the name before it, in brackets, may itself hold spaces and brackets
            fields = f.read().rpartition(')')[2].split()
        # a zombie has ended and only waits to be counted
        return None if fields[0] in 'ZX' else int(fields[19])
    except OSError:
        pass
    if osp.isdir('/proc/self'):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


@contextmanager
def locked(work_dir: str) -> Iterator[None]:
    """Hold the lock of a work dir, that exists, for the time of the block.

    Raises:
        UsageError: If another process holds it, with its host, pid and start; or if one of another
            machine left it, which cannot be asked from here.
    """
    path = osp.join(work_dir, LOCK)
    handle = _take(path)
    try:
        yield
    finally:
        # the work dir may have been deleted, or the file removed by hand and taken by another
        if _same(handle, path):
            os.remove(path)
        os.close(handle)


def _take(path: str) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise UsageError(
                f'{path!r} cannot be written: {e.strerror or e}; make room, or choose another work'
                ' dir with --work-dir'
            ) from e
        try:
            alone = _kernel_lock(handle)
            # it was released between opening and locking: that file has no name any more
            if not _same(handle, path):
                os.close(handle)
                continue
            holder = _read(handle)
            if not alone or _may_run(holder):
                raise UsageError(_refusal(path, holder))
            _write(handle)
            return handle
        except BaseException:
            os.close(handle)
            raise


def _kernel_lock(handle: int) -> bool:
    """Whether no other process holds the file; True where the system or the file system has no such
    locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        # of the process, not of the open file: loader workers that outlive a killed run by some
        # seconds do not keep it
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _same(handle: int, path: str) -> bool:
    try:
        return osp.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _read(handle: int) -> dict[str, Any]:
    """Who wrote the file; nothing where it is empty, or nobody who can be named."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    types = dict(host=str, pid=int, ticks=int, started=str)
    named = isinstance(holder, dict) and all(
        type(holder.get(key)) is kind for key, kind in types.items()
    )
    return holder if named else {}


def _write(handle: int) -> None:
    holder = dict(
        host=socket.gethostname(),
        pid=os.getpid(),
        ticks=start_of(os.getpid()) or 0,
        started=time.strftime('%Y-%m-%d %H:%M:%S'),
    )
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)
    os.fsync(handle)


def _may_run(holder: dict[str, Any]) -> bool:
    """Whether the one who wrote the file may still run, although the kernel's lock is free."""
    if not holder:
        return False
    if holder['host'] != socket.gethostname():
        return True
    return holder['pid'] != os.getpid() and start_of(holder['pid']) == holder['ticks']


def _refusal(path: str, holder: dict[str, Any]) -> str:
    who = (
        f'process {holder["pid"]} on {holder["host"]}, started {holder["started"]}'
        if holder
        else 'another process'
    )
    start = f'work dir {osp.dirname(path)!r} is in use by {who}; '
    if holder and holder['host'] != socket.gethostname():
        return start + (
            'wait for it or stop it there. That is another machine than this one'
            f' ({socket.gethostname()}): if it no longer runs, remove {path!r} and start again'
        )
    return start + 'wait for it, stop it, or choose another with --work-dir'
