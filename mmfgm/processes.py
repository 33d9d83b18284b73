# Copyright (c) mmfgm authors.
"""Several processes as one: starting them, doing something once, sharded tensors, and progress."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmfgm.errors import EXIT_USAGE, UsageError

T = TypeVar('T')

# the number of this process, as torchrun, Slurm and Open MPI name it
RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
PR_SET_PDEATHSIG = 1


def is_first(launcher: str) -> bool:
    """Whether this is the first of a launcher's processes, before they are connected."""
    return launcher == 'none' or os.environ.get(RANKS[launcher], '0') == '0'


def end_with_parent() -> None:
    """Have this process killed when its launcher ends, however that ends.

    A launcher that is killed cannot tell its processes, which would train on beside the run that is
    started next. Linux kills them at the same moment; elsewhere they look once a second. It is
    SIGKILL and not SIGTERM, after which they would go on until the next checkpoint: what a killed
    launcher leaves must be gone when the user starts again.
    """
    parent = os.getppid()
    try:
        linked = ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    except (OSError, AttributeError, TypeError):  # no such call here
        linked = False
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    if not linked:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))


def run_apart(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` in a process of its own, which has its own peak of memory and random
    state, and ends with this one."""
    with ProcessPoolExecutor(
        1, mp_context=get_context('spawn'), initializer=end_with_parent
    ) as pool:
        return pool.submit(function, *args).result()


def init_processes(launcher: str, backend: str | None = None, **kwargs: Any) -> None:
    """Connect the processes of a launcher, one per GPU, or with gloo where there is none; nothing
    without a launcher. From then on they end with it, see :func:`end_with_parent`.

    Args:
        launcher (str): ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        backend (str, optional): Of torch.distributed, on GPUs. Defaults to ``'nccl'``.
        **kwargs: For MMEngine's ``init_dist``.

    Raises:
        UsageError: If there are more processes than GPUs.
    """
    if launcher == 'none' or dist.is_initialized():
        return
    end_with_parent()
    if not torch.cuda.is_available():
        # init_dist would call torch.cuda.set_device
        dist.init_process_group(backend='gloo')
        return
    here = int(os.environ.get('LOCAL_WORLD_SIZE', os.environ.get('SLURM_NTASKS_PER_NODE', 1)))
    if here > torch.cuda.device_count():
        raise UsageError(
            f'{here} processes were started on this machine, but it has'
            f' {torch.cuda.device_count()} GPU(s); start one process per GPU'
        )
    from mmengine.dist import init_dist

    init_dist(launcher, backend or 'nccl', **kwargs)


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For loader workers: torchrun's SIGTERM and a terminal's Ctrl-C reach them too, but the
    process that they work for decides when to stop. It must end them itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StopSignals:
    """SIGTERM and Ctrl-C as a wish to stop at the next good moment, on which all processes agree.

    A second Ctrl-C ends the process at once, also where Python cannot run a handler.
    """

    def __init__(self) -> None:
        self._name = ''
        self._group: Any = None
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """What asked to stop; ``'SIGTERM'`` where only another process knows."""
        return self._name or 'SIGTERM'

    def begin(self) -> None:
        """Notice signals from now on; call on all processes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._notice)
        if self._group is None and rank_and_size()[1] > 1:
            # on the CPU, so that asking costs no wait for the GPU
            self._group = dist.new_group(backend='gloo')

    def end(self) -> None:
        """Leave signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _notice(self, number: int, frame: Any) -> None:
        self._name = 'SIGTERM' if number == signal.SIGTERM else 'Ctrl-C'
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # print is not for signal handlers: it may have been interrupted itself
            os.write(2, b'\nCtrl-C: saving and stopping; a second Ctrl-C stops at once\n')

    def agreed(self) -> bool:
        """Whether any process was asked to stop; the same answer on all of them, which all call
        it."""
        if self._group is None:
            return bool(self._name)
        flag = torch.tensor(int(bool(self._name)))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


def connect(launcher: str, local_rank: int = 0) -> None:
    """Connect processes that meet only at the start and at the end of long parts, hours apart.

    Args:
        launcher (str): As for :func:`init_processes`.
        local_rank (int): Of this process, where the launcher does not set ``LOCAL_RANK``.
    """
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    patience = dict(timeout=timedelta(days=7)) if torch.cuda.is_available() else {}
    init_processes(launcher, 'gloo', **patience)


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; ``(0, 1)`` where there is no launcher."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def on_main(function: Callable[[], T]) -> T:
    """The first process's result on all of them; its UsageError ends them all, with one message."""
    rank, world_size = rank_and_size()
    results: list[Any] = [None]
    if rank == 0:
        try:
            results = [(function(), None)]
        except UsageError as e:
            results = [(None, e)]
    if world_size > 1:
        dist.broadcast_object_list(results)
    result: T
    result, error = results[0]
    if error is not None:
        raise error if rank == 0 else SystemExit(EXIT_USAGE)
    return result


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor (this process's part of a sharded one) holds neither inf nor nan."""
    tensor = local(tensor.detach())
    if tensor.is_meta or not tensor.numel() or not (tensor.is_floating_point()):
        return True
    if tensor.element_size() == 1:  # torch knows the smallest and largest of no 8-bit type
        tensor = tensor.float()
    # one pass without a copy: nan is both, inf one of the two; isfinite() takes 20 times as long
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


class Progress:
    """Says every ten seconds, and at the end, how far the first process is with its part.

    Args:
        total (int): Items of this process.
        unit (str): What an item is called.
    """

    def __init__(self, total: int, unit: str):
        self.total = total
        self.unit = unit
        self.done = 0
        self.began = self.said = time.perf_counter()

    def step(self, count: int) -> None:
        """Count items that are done."""
        self.done += count
        rank, world_size = rank_and_size()
        now = time.perf_counter()
        if rank == 0 and (now - self.said > 10 or self.done == self.total):
            self.said = now
            rate = self.done / (now - self.began)
            eta = timedelta(seconds=round((self.total - self.done) / rate))
            print(
                f'process 1 of {world_size}: {self.done:,} of {self.total:,} {self.unit}s,'
                f' {rate:.1f} {self.unit}s/s, ETA {eta}',
                flush=True,
            )
