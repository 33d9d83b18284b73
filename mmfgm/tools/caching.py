# Copyright (c) mmfgm authors.
"""What the caching tools share: whole shards, split over processes, and going on where a run
stopped."""

import argparse
import glob
import json
import os
import os.path as osp
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from mmengine.dist import barrier, broadcast_object_list, get_dist_info
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmfgm.datasets.cached import NULL, differences, read_manifest
from mmfgm.datasets.files import sha256
from mmfgm.engine import init_processes
from mmfgm.engine.checkpoint import write_text_atomically
from mmfgm.errors import UsageError

from .cli import EXIT_USAGE

DTYPES = dict(bf16='bfloat16', fp32='float32')


def add_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both tools."""
    parser.add_argument(
        'out',
        help='the cache, a folder; one that an earlier run began is taken up where it stopped',
    )
    parser.add_argument(
        '--model',
        required=True,
        help='a Stable Diffusion 3 folder of diffusers, or an id on the hub',
    )
    parser.add_argument('--batch-size', type=int, default=16, help='per process (default: 16)')
    parser.add_argument(
        '--dtype', choices=list(DTYPES), default='bf16', help='of the stored values (default: bf16)'
    )
    parser.add_argument(
        '--shard-size', type=int, default=1000, help='items per file (default: 1000)'
    )
    parser.add_argument(
        '--max-length', type=int, default=256, help='T5 tokens of a prompt (default: 256)'
    )
    parser.add_argument(
        '--drop-padding',
        choices=['none', 't5', 'all'],
        nargs='?',
        const='t5',
        default='none',
        help="do not store T5's padding tokens, or CLIP's neither; see above",
    )
    parser.add_argument(
        '--without-t5',
        action='store_true',
        help='leave T5 out; its tokens are zero, as in diffusers',
    )
    parser.add_argument(
        '--on-bad',
        choices=['error', 'skip'],
        default='error',
        help=(
            'what to do about bad items; those skipped are listed in the manifest (default: error)'
        ),
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def start(args: argparse.Namespace) -> str:
    """Check the numbers, connect the processes, and return the device to work on."""
    for name, largest in dict(
        batch_size=None, shard_size=None, max_length=512
    ).items():  # diffusers allows 512
        value = getattr(args, name)
        if value < 1 or (largest and value > largest):
            raise UsageError(
                f'--{name.replace("_", "-")} must be at least'
                f' 1{f" and at most {largest}" if largest else ""}, but is {value}'
            )
    connect(args)
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def connect(args: argparse.Namespace) -> None:
    """Connect the processes of ``args.launcher``, which may be hours apart."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    # gloo, and patiently: processes meet at the start and at the end of long parts only
    init_processes(
        args.launcher,
        'gloo',
        **(dict(timeout=timedelta(days=7)) if torch.cuda.is_available() else {}),
    )


def on_main(function: Callable[[], Any]) -> Any:
    """The first process's result on all of them; its UsageError ends them all, with one message."""
    rank, _ = get_dist_info()
    results: list[Any] = [None]
    if rank == 0:
        try:
            results = [(function(), None)]
        except UsageError as e:
            results = [(None, e)]
    broadcast_object_list(results)
    result, error = results[0]
    if error is not None:
        raise error if rank == 0 else SystemExit(EXIT_USAGE)
    return result


class Progress:
    """Says every ten seconds, and at the end, how far the first process is with its part.

    Args:
        total (int): Items of this process.
        unit (str): What an item is called.
    """

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.done = total, unit, 0
        self.began = self.said = time.perf_counter()

    def step(self, count: int) -> None:
        """Count items that are done."""
        self.done += count
        rank, world_size = get_dist_info()
        now = time.perf_counter()
        if rank == 0 and (now - self.said > 10 or self.done == self.total):
            self.said, rate = now, self.done / (now - self.began)
            eta = timedelta(seconds=round((self.total - self.done) / rate))
            print(
                f'process 1 of {world_size}: {self.done:,} of {self.total:,} {self.unit}s,'
                f' {rate:.1f} {self.unit}s/s, ETA {eta}',
                flush=True,
            )


class ShardWriter:
    """Writes a cache shard by shard, so that what is finished stays finished.

    Until the manifest is written, ``job.json`` says what is being made and a ``.json`` beside each
    shard that it is whole.

    Args:
        path (str): The cache's folder.
        job (dict): What is made: ``kind``, ``identity``, ``settings``, ``source``, ``layout``; all
            of it must be the same to go on with what another run began.
    """

    def __init__(self, path: str, job: dict):
        self.path, self.job = path, json.loads(json.dumps(job))
        mask = os.umask(0)
        os.umask(mask)
        self.mode = 0o666 & ~mask

    def begin(self) -> dict[str, dict]:
        """Make or take up the folder, on one process; returns the entries of the files that are
        finished already.

        Raises:
            UsageError: If the folder holds something else.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as e:
            raise UsageError(f'the folder {self.path!r} cannot be made: {e}; name another') from e
        for file in glob.glob(osp.join(glob.escape(self.path), '*.tmp')):  # of a killed process
            os.remove(file)
        manifest, unfinished = osp.join(self.path, 'manifest.json'), osp.join(self.path, 'job.json')
        if osp.exists(manifest):
            began = read_manifest(self.path)
        elif osp.exists(unfinished):
            began = _read_json(unfinished)
        else:
            if os.listdir(self.path):
                raise UsageError(f'{self.path!r} is neither empty nor a cache; name another folder')
            began = {}
            _write_json(unfinished, self.job)
        if began:
            differs = list(differences(self.job, {key: began.get(key) for key in self.job}))
            if differs:
                raise UsageError(
                    f'{self.path!r} was begun with something else: {"; ".join(differs[:4])}; give'
                    ' the same prompts or images, model and settings to go on, or name another'
                    ' folder'
                )
        entries = [*began.get('shards', ()), *([began['null']] if began.get('null') else [])]
        entries += [
            _read_json(file)
            for file in glob.glob(osp.join(glob.escape(self.path), '*.safetensors.json'))
        ]
        return {
            entry['file']: entry
            for entry in entries
            if osp.isfile(osp.join(self.path, entry['file']))
            and osp.getsize(osp.join(self.path, entry['file'])) == entry['size']
        }

    @staticmethod
    def name(number: int) -> str:
        return f'shard_{number:06d}.safetensors'

    def write(self, name: str, tensors: dict[str, Tensor], count: int, **entry: Any) -> None:
        """Write one shard, then the entry that says it is whole."""
        path, unfinished = (
            osp.join(self.path, name),
            osp.join(self.path, f'{name}.{os.getpid()}.tmp'),
        )
        try:
            # more than one key of metadata would be written in random order
            save_file(
                {key: value.contiguous() for key, value in tensors.items()},
                unfinished,
                dict(format='pt'),
            )
            os.chmod(unfinished, self.mode)  # save_file's are for their owner only
            with open(unfinished, 'rb+') as f:
                os.fsync(f.fileno())
            entry = dict(
                file=name,
                count=count,
                size=osp.getsize(unfinished),
                sha256=sha256(unfinished),
                **entry,
            )
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as e:
            raise UsageError(
                f'{path!r} cannot be written: {e}; what is finished stays: make room and run again'
            ) from e
        _write_json(f'{path}.json', entry)

    def finish(self, names: Sequence[str]) -> dict:
        """Write the manifest of these shards, on one process, and return it."""
        done, start, shards = self.begin(), 0, []
        for name in names:
            entry = done[name]
            shards.append(dict(entry, start=start))
            start += entry['count']
        manifest = dict(self.job, count=start, shards=shards, null=done.get(NULL))
        _write_json(osp.join(self.path, 'manifest.json'), manifest)
        for file in [
            *glob.glob(osp.join(glob.escape(self.path), '*.safetensors.json')),
            osp.join(self.path, 'job.json'),
        ]:
            if osp.exists(file):
                os.remove(file)
        return manifest


def _read_json(path: str) -> dict:
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError as e:
        raise UsageError(f'{path!r} is damaged ({e}); delete it and run again') from e


def _write_json(path: str, content: dict) -> None:
    write_text_atomically(path, f'{json.dumps(content, indent=1, sort_keys=True)}\n')


def run_job(
    writer: ShardWriter,
    count: int,
    shard_size: int,
    batch_size: int,
    encode: Callable,
    null: Callable | None,
    unit: str,
) -> None:
    """Encode what is not finished yet, whole shards at a time, and write the manifest.

    Batches start anew with each shard, so values depend neither on a restart nor on the number of
    processes.

    Args:
        writer (ShardWriter): Of the cache.
        count (int), shard_size (int), batch_size (int): In items.
        encode (Callable): Takes a list of item numbers to a dict of tensors and a list of what it
            skipped.
        null (Callable, optional): Makes the tensors of the empty prompt.
        unit (str): What an item is called, for the progress.
    """
    rank, world_size = get_dist_info()
    done = on_main(writer.begin)
    numbers = range(-(-count // shard_size))
    # of the unfinished ones, so that all processes have work after a restart too
    mine = [number for number in numbers if writer.name(number) not in done][rank::world_size]
    if null is not None and rank == 0 and NULL not in done:
        writer.write(NULL, null(), 1)
    progress = Progress(sum(min(shard_size, count - number * shard_size) for number in mine), unit)
    for number in mine:
        items = list(range(number * shard_size, min(count, (number + 1) * shard_size)))
        parts, skipped = [], []
        for first in range(0, len(items), batch_size):
            batch = items[first : first + batch_size]
            tensors, bad = encode(batch)
            skipped += bad
            if tensors:
                parts.append(tensors)
            progress.step(len(batch))
        shard = {
            name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())
        }
        writer.write(
            writer.name(number),
            shard,
            len(items) - len(skipped),
            **(dict(skipped=skipped) if skipped else {}),
        )
    barrier()
    manifest = on_main(lambda: writer.finish([writer.name(number) for number in numbers]))
    if rank == 0:
        size = sum(entry['size'] for entry in manifest['shards'])
        print(
            f'{writer.path}: {manifest["count"]:,} {unit}s in {len(manifest["shards"])} shards, '
            f'{size / max(manifest["count"], 1):,.0f} bytes per {unit}',
            flush=True,
        )


def keep_good(names: Sequence[str], bad: dict[int, str], on_bad: str) -> list[list[str]]:
    """Names and reasons of what is bad.

    Raises:
        UsageError: Unless bad ones are to be skipped, or if there are no others.
    """
    listed = [[names[i], reason] for i, reason in bad.items()]
    if bad and (on_bad == 'error' or len(bad) == len(names)):
        shown = '; '.join(f'{name} {reason}' for name, reason in listed[:8])
        raise UsageError(
            f'{len(bad)} of {len(names)} cannot be used: {shown}{"; ..." if len(bad) > 8 else ""};'
            ' correct them, or leave them out with --on-bad skip'
        )
    return listed
