# Copyright (c) mmfgm authors.
"""Writing a cache: whole shards, split over processes, and going on where a run stopped."""

import glob
import json
import os
import os.path as osp
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.dist import barrier
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmfgm.datasets import NULL, checksums, read_manifest
from mmfgm.errors import UsageError
from mmfgm.files import differences, read_json, seal, sha256, whole_file, write_file
from mmfgm.processes import Progress, on_main, rank_and_size

LEFT_OVER = re.compile(
    r'(shard_\d+\.safetensors|null\.safetensors|manifest|job)(\.json)?\.[0-9a-f]+\.tmp'
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
        self.path = path
        self.job = json.loads(json.dumps(job))

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
        manifest, unfinished = osp.join(self.path, 'manifest.json'), osp.join(self.path, 'job.json')
        if osp.exists(manifest):
            began = read_manifest(self.path)
        elif osp.exists(unfinished):
            began = read_json(unfinished, 'delete it and run again', dict)
            began.setdefault('conditions', self.job.get('conditions'))
        else:
            if os.listdir(self.path):
                raise UsageError(f'{self.path!r} is neither empty nor a cache; name another folder')
            began = {}
            _write_json(unfinished, self.job)
        # what a killed process left, once the folder is known to be a cache
        for name in os.listdir(self.path):
            if LEFT_OVER.fullmatch(name):
                os.remove(osp.join(self.path, name))
        if began:
            differs = list(differences(self.job, {key: began.get(key) for key in self.job}))
            if differs:
                raise UsageError(
                    f'{self.path!r} was begun with something else: {"; ".join(differs[:4])}; give'
                    ' what it was begun with (source, model and settings) to go on, or name another'
                    ' folder'
                )
        entries = [*began.get('shards', ()), *([began['null']] if began.get('null') else [])]
        entries += [
            read_json(file, 'delete it and run again', dict)
            for file in glob.glob(osp.join(glob.escape(self.path), '*.safetensors.json'))
        ]
        for entry in entries:
            if not re.fullmatch(r'\w+\.safetensors', str(entry.get('file'))) or not all(
                type(entry.get(key)) is int for key in ('count', 'size')
            ):
                raise UsageError(
                    f'{self.path!r} has a damaged note of a finished shard: {str(entry)[:80]};'
                    ' delete its *.safetensors.json files and run again'
                )
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
        path = osp.join(self.path, name)
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        tensors.update(checksums(tensors))
        try:
            with whole_file(path) as unfinished:
                # more than one key of metadata would be written in random order
                save_file(tensors, unfinished, dict(format='pt'))
                entry = dict(
                    file=name,
                    count=count,
                    size=osp.getsize(unfinished),
                    sha256=sha256(unfinished),
                    **entry,
                )
        except (OSError, SafetensorError) as e:
            raise UsageError(
                f'{path!r} cannot be written: {e}; what is finished stays: make room and run again'
            ) from e
        _write_json(f'{path}.json', entry)

    def finish(self, names: Sequence[str]) -> dict:
        """Write the manifest of these shards, on one process, and return it."""
        done = self.begin()
        start = 0
        shards = []
        for name in names:
            entry = done[name]
            shards.append(dict(entry, start=start))
            start += entry['count']
        manifest = dict(self.job, count=start, shards=shards, null=done.get(NULL))
        _write_json(osp.join(self.path, 'manifest.json'), seal(manifest))
        for file in [
            *glob.glob(osp.join(glob.escape(self.path), '*.safetensors.json')),
            osp.join(self.path, 'job.json'),
        ]:
            if osp.exists(file):
                os.remove(file)
        return manifest


def _write_json(path: str, content: dict) -> None:
    write_file(path, f'{json.dumps(content, indent=1, sort_keys=True)}\n')


def write_shards(
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
    rank, world_size = rank_and_size()
    done = on_main(writer.begin)
    numbers = range(-(-count // shard_size))
    # of the unfinished ones, so that all processes have work after a restart too
    mine = [number for number in numbers if writer.name(number) not in done][rank::world_size]
    if null is not None and rank == 0 and NULL not in done:
        writer.write(NULL, null(), 1)
    progress = Progress(sum(min(shard_size, count - number * shard_size) for number in mine), unit)
    for number in mine:
        items = list(range(number * shard_size, min(count, (number + 1) * shard_size)))
        parts = []
        skipped = []
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
