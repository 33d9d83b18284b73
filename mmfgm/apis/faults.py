# Copyright (c) mmfgm authors.
"""A user's config under faults: killed, stopped, out of disk, damaged, and compared bit for bit.

One run is left alone. Others of the same config are disturbed at random moments, until each has
finished; what they end with must be what the first one ended with.
"""

import os
import os.path as osp
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

import mmfgm
from mmfgm.errors import EXIT_PREEMPTED, EXIT_USAGE, UsageError
from mmfgm.files import check_work_dir, write_file
from mmfgm.locks import start_of
from mmfgm.models import EXTRAS, latest_checkpoint, read_pickle, read_shards, sharded_shapes

from .config import read_dump

# what a run says when its first iteration is about to begin
BEGUN = 'Checkpoints will be saved'
KINDS = ('worker', 'launcher', 'all', 'sigterm', 'disk', 'damage', 'clock')
STRATEGIES = dict(ddp='DDPStrategy', fsdp2='FSDP2Strategy')
# a run without any progress for so long has hung
PATIENCE = 1800


def descendants(pid: int) -> list[int]:
    """The processes that come from one, without it."""
    try:
        with open(f'/proc/{pid}/task/{pid}/children') as f:
            children = [int(child) for child in f.read().split()]
    except OSError:
        return []
    return [p for child in children for p in (child, *descendants(child))]


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def first_difference(a: Any, b: Any, name: str = '') -> str | None:
    """The name of the first value that differs in two nested containers, bit for bit; None where
    none does."""
    if type(a) is not type(b):
        return name
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return f'{name} (keys)'
        pairs = [(f'{name}.{key}', a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f'{name} (length)'
        pairs = [(f'{name}.{i}', x, y) for i, (x, y) in enumerate(zip(a, b))]
    elif isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
        return None if same else name
    else:
        # a nan is itself here
        return None if a == b or (a != a and b != b) else name
    found = (first_difference(x, y, key.lstrip('.')) for key, x, y in pairs)
    return next((key for key in found if key is not None), None)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def final_state(work_dir: str) -> dict[str, Any]:
    """All that a run's last checkpoint holds but times and paths."""
    path = latest_checkpoint(work_dir)
    if path is None:
        raise UsageError(f'{work_dir!r} holds no checkpoint; train there first')
    sharded = osp.isdir(path)
    content = read_pickle(osp.join(path, EXTRAS) if sharded else path)
    keep = ('state_dict', 'optimizer', 'param_schedulers', 'rng')
    state = {key: content[key] for key in keep if key in content}
    state['history'] = {
        key: value[0]
        for key, value in content['message_hub']['log_scalars'].items()
        if not any(word in key for word in ('time', 'second', 'memory'))
    }
    if sharded:
        with warnings.catch_warnings():
            # that there is one process
            warnings.simplefilter('ignore')
            state['sharded'] = read_shards(path, {name: name for name in sharded_shapes(path)})
    return state


class _Run:
    """A training in processes of its own, and what it has said."""

    def __init__(self, command: Sequence[str], log: str):
        self.lines: list[str] = []
        self.begun = threading.Event()
        self._log = log
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with open(self._log, 'a') as log:
            for line in self.process.stdout:
                self.lines.append(line)
                log.write(line)
                if BEGUN in line:
                    self.begun.set()
        self.begun.set()

    @property
    def text(self) -> str:
        return ''.join(self.lines)

    def tree(self) -> list[int]:
        return [self.process.pid, *descendants(self.process.pid)]

    def wait(self) -> int:
        """Its exit code, once none of its processes is left."""
        tree = self.tree()
        try:
            code = self.process.wait(PATIENCE)
            deadline = time.monotonic() + 60
            # a worker that outlives its launcher would be a fault of ours
            while any(start_of(pid) is not None for pid in tree):
                if time.monotonic() > deadline:
                    raise UsageError(
                        f'processes {[p for p in tree if start_of(p)]} outlive the run that they'
                        f' came from by a minute; see {self._log}, and end them'
                    )
                time.sleep(0.05)
        finally:
            for pid in tree:
                _kill(pid)
        self._reader.join(PATIENCE)
        return code


@dataclass
class Torture:
    """One config, disturbed.

    Args:
        folder (str): Where all of it happens.
        command (Callable): Makes the command of a run from its work dir and its arguments; the
            argument ``clock`` is a number of seconds, by which its clock jumps.
        processes (int): Of a run.
        kinds (Sequence[str]): Faults to choose from: ``'worker'``, ``'launcher'`` and ``'all'`` are
            SIGKILLs, then ``'sigterm'``, ``'disk'``, ``'damage'`` of the newest checkpoint, and
            ``'clock'``.
        seed (int): Of the choices; moments also depend on the machine.
    """

    folder: str
    command: Callable[[str, float], list[str]]
    processes: int = 1
    kinds: Sequence[str] = KINDS
    seed: int = 0
    tried: Counter = field(default_factory=Counter)
    held: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.log = osp.join(self.folder, 'torture.log')
        # launching two more processes and killing their launcher is about the same
        self.kinds = [k for k in self.kinds if k != 'launcher' or self.processes > 1]

    def run(self, minutes: float, faults: int | None = None) -> str | None:
        """Disturb until the time is over, or so many faults are tried.

        Returns:
            str, optional: Where the first disturbed run parted; None if all ended alike.

        Raises:
            UsageError: If the config does not even run undisturbed.
        """
        check_work_dir(self.folder)
        whole = osp.join(self.folder, 'whole')
        self._say('the run that is left alone ...')
        run = _Run(self.command(whole, 0), self.log)
        run.begun.wait(PATIENCE)
        begun = time.monotonic()
        if run.wait():
            raise UsageError(
                f'the config does not run undisturbed; see the end of {self.log}, and mend it'
            )
        # a moment that is uniform over the run hits each part as often as it lasts
        self.seconds = max(time.monotonic() - begun, 0.5)
        self._expected = final_state(whole)
        self._end = self._began = time.monotonic()
        self._end += 60 * minutes
        self._faults = faults
        number = 0
        while self._goes_on():
            parted = self._round(osp.join(self.folder, f'round_{number}'))
            if parted is not None:
                return parted
            number += 1
        return None

    def _goes_on(self) -> bool:
        enough = self._faults is not None and self.tried.total() >= self._faults
        return time.monotonic() < self._end and not enough

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _round(self, work_dir: str) -> str | None:
        """One run to its end, through faults."""
        shutil.rmtree(work_dir, ignore_errors=True)
        here: Counter = Counter()
        # a run that never came to its end would be compared with nothing
        for _ in range(self.random.randint(1, 6)):
            if not self._goes_on():
                break
            kind = self.random.choice(list(self.kinds))
            done, problem = self._fault(kind, work_dir)
            if problem is not None:
                return f'{problem}; see {self.log} and {work_dir}'
            if not done:
                break  # the run had ended before
            self.tried[kind] += 1
            here[kind] += 1
            self._progress(kind)
        if not here:
            return None
        run = _Run(self.command(work_dir, 0), self.log)
        code = run.wait()
        if code:
            return f'resuming after {dict(here)} exited with {code}; see {self.log} and {work_dir}'
        name = first_difference(self._expected, final_state(work_dir))
        if name is not None:
            return f'after {dict(here)} the run parted at {name}; see {self.log} and {work_dir}'
        self.held += here
        shutil.rmtree(work_dir)
        return None

    def _progress(self, kind: str) -> None:
        left = self._end - time.monotonic()
        if self._faults is not None:
            rate = self.tried.total() / (time.monotonic() - self._began)
            left = min(left, (self._faults - self.tried.total()) / rate)
        self._say(
            f'fault {self.tried.total()} ({kind}), {self.held.total()} compared and the same; ETA'
            f' {timedelta(seconds=max(round(left), 0))}'
        )

    def _fault(self, kind: str, work_dir: str) -> tuple[bool, str | None]:
        """Start or resume, and disturb at a random moment.

        Returns:
            tuple: Whether the fault came before the end of the run, and what went wrong that may
            not.
        """
        jump = self.random.choice([-1, 1]) * self.random.uniform(3600, 400 * 86400)
        run = _Run(self.command(work_dir, jump if kind == 'clock' else 0), self.log)
        run.begun.wait(PATIENCE)
        time.sleep(self.random.uniform(0, self.seconds))
        tree = run.tree()
        workers = tree[1:] if self.processes > 1 else tree[:1]
        if run.process.poll() is not None:
            code = run.wait()
            return False, f'undisturbed, it exited with {code}' if code else None
        if kind == 'worker':
            _kill(self.random.choice(workers or tree))
        elif kind in ('launcher', 'damage', 'clock'):
            _kill(tree[0])
        elif kind == 'all':
            for pid in tree:
                _kill(pid)
        elif kind == 'sigterm':
            _kill(tree[0], signal.SIGTERM)
        elif kind == 'disk':
            self._fill(workers)
        code = run.wait()
        if code == 0:
            return False, None
        # before the first iteration and after the last one, it ends a run as it ends any process
        if kind == 'sigterm' and self.processes == 1:
            if code not in (EXIT_PREEMPTED, -signal.SIGTERM):
                return True, f'SIGTERM ended it with {code} instead of {EXIT_PREEMPTED}'
        if kind == 'disk':
            if 'make room' not in run.text:
                return True, 'a full disk was not told'
        if kind == 'damage':
            return True, self._damage(work_dir)
        return True, None

    @staticmethod
    def _fill(pids: Sequence[int]) -> None:
        """A limit on the size of their files: the same to whoever writes as a full disk."""
        import resource

        for pid in pids:
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
            except (ProcessLookupError, PermissionError):
                pass

    def _damage(self, work_dir: str) -> str | None:
        """Damage the newest checkpoint: resuming must refuse it, and go on from another."""
        newest = latest_checkpoint(work_dir)
        if newest is None:
            return None
        files = [newest]
        if osp.isdir(newest):
            files = [osp.join(newest, name) for name in sorted(os.listdir(newest))]
        target = self.random.choice(files)
        way = self.random.choice(['cut', 'zeros', 'bit'])
        size = osp.getsize(target)
        with open(target, 'r+b') as f:
            if way == 'cut':
                f.truncate(self.random.randrange(size))
            else:
                at = self.random.randrange(size)
                f.seek(at)
                old = f.read(4096 if way == 'zeros' else 1)
                f.seek(at)
                f.write(bytes(len(old)) if way == 'zeros' else bytes([old[0] ^ 4]))
        run = _Run(self.command(work_dir, 0), self.log)
        code = run.wait()
        refused = code == EXIT_USAGE or (self.processes > 1 and code == 1)
        if code and (not refused or run.text.count('\nerror: ') != 1):
            return f'{target} was damaged ({way}), and resuming ended with {code}, not one message'
        if not code:
            return None  # it found its way alone, or is compared at the end
        shutil.move(newest, f'{newest}.damaged')
        older = [
            name
            for name in os.listdir(work_dir)
            if name.startswith('iter_') and name.endswith('.pth')
        ]
        pointer = osp.join(work_dir, 'last_checkpoint')
        if older:
            write_file(pointer, max(older, key=lambda name: int(name[5:-4])))
        else:
            os.remove(pointer)
        return None


def torture(
    work_dir: str,
    entry: Sequence[str],
    minutes: float = 30,
    processes: int = 1,
    strategy: str | None = None,
    iterations: int = 40,
    options: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    faults: int | None = None,
    seed: int = 0,
) -> Torture:
    """Torture the config of a run.

    Args:
        work_dir (str): Of the run, whose config is read from there. All happens in its folder
            ``torture``.
        entry (Sequence[str]): Arguments of Python that start a training, before the seconds of its
            clock's jump and the arguments of ``tools/train.py``.
        minutes (float): How long. Defaults to 30.
        processes (int): Of a run. Defaults to 1.
        strategy (str, optional): ``'ddp'`` or ``'fsdp2'``. Defaults to the config's.
        iterations (int): Length of a run, with eight checkpoints. Defaults to 40.
        options (Sequence[str]): Config overrides ``KEY=VALUE``.
        kinds (Sequence[str]), faults (int, optional), seed (int): See :class:`Torture`.

    Raises:
        UsageError: If the work dir holds no config, or the faults parted a run.
    """
    if not osp.isdir('/proc/self'):
        raise UsageError('the processes of a run are found below /proc; use Linux')
    dumps = sorted(
        osp.join(folder, 'config.py')
        for folder, _, names in os.walk(work_dir)
        if osp.basename(folder) == 'vis_data'
        and 'config.py' in names
        # one of ours
        and f'{os.sep}torture{os.sep}' not in osp.join(folder, '')
    )
    if not dumps:
        raise UsageError(
            f'{work_dir!r} holds no run (no TIMESTAMP/vis_data/config.py); train there first, for'
            ' example for one iteration'
        )
    folder = osp.abspath(osp.join(work_dir, 'torture'))
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    # read as data before it is a program of a run
    config = read_dump(dumps[-1])
    written = osp.join(folder, 'config.py')
    config.dump(written)
    overrides = [
        f'train_cfg.max_iters={iterations}',
        f'default_hooks.checkpoint.interval={max(iterations // 8, 1)}',
        *([f'strategy.type={STRATEGIES[strategy]}'] if strategy else []),
        *options,
    ]
    launcher = ['--launcher', 'pytorch'] if processes > 1 else []

    def command(run_dir: str, clock: float) -> list[str]:
        start = [sys.executable]
        if processes > 1:
            start += ['-m', 'torch.distributed.run', '--standalone']
            start += [f'--nproc_per_node={processes}']
        return [
            *start, *entry, str(clock), written, '--work-dir', run_dir, '--resume', *launcher,
            '--cfg-options', *overrides,
        ]  # fmt: skip

    os.environ['PYTHONPATH'] = os.pathsep.join(
        [osp.dirname(osp.dirname(mmfgm.__file__)), os.environ.get('PYTHONPATH', '')]
    )
    os.environ['PYTHONUNBUFFERED'] = '1'
    result = Torture(folder, command, processes, kinds, seed)
    parted = result.run(minutes, faults)
    lines = [
        f'{kind}: {result.tried[kind]} tried, {result.held[kind]} held' for kind in result.kinds
    ]
    print('\n'.join(lines))
    if parted is not None:
        raise UsageError(f'after {result.tried.total()} faults: {parted}')
    print(f'{result.held.total()} faults, all bit for bit')
    return result
