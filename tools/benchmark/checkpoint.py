# Copyright (c) mmfgm authors.
"""What checksums cost: seconds to save and to load a checkpoint with and without them, and their
ratio."""

import argparse
import os.path as osp
import shutil
import tempfile
import time
from collections.abc import Callable
from unittest import mock
from warnings import simplefilter

import torch

from mmfgm.engine.checkpoint import save_directory, save_file
from mmfgm.files import sha256
from mmfgm.models import EXTRAS, check_shards, load_shards, read_pickle, read_state_dict

LAYERS = 25


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--megabytes', type=int, default=500, help='of the checkpoint')
    parser.add_argument('--repeats', type=int, default=5, help='the fastest is taken')
    parser.add_argument('--folder', help='where to write (default: the temporary folder)')
    return parser.parse_args()


def tensors(megabytes: int) -> dict:
    """A generator with its average and Adam's two moments: four equal parts."""
    size = megabytes * 1_000_000 // 4 // 4 // LAYERS

    def part() -> dict:
        return {f'layers.{i}.weight': torch.randn(size) for i in range(LAYERS)}

    moments = {
        i: dict(exp_avg=a, exp_avg_sq=b)
        for i, (a, b) in enumerate(zip(*(part().values(), part().values())))
    }
    return dict(
        state_dict={
            f'{name}.{key}': value
            for name in ('generator', 'generator_ema')
            for key, value in part().items()
        },
        optimizer=dict(generator=dict(state=moments)),
    )


def touch(content: object) -> None:
    """Read what lies on the disk until it is used, as loading it into a model does."""
    if isinstance(content, torch.Tensor):
        content.clone()
    elif isinstance(content, dict):
        for value in content.values():
            touch(value)


def compare(name: str, repeats: int, without: Callable[[], object], with_: Callable) -> None:
    seconds: dict[str, list[float]] = dict(without=[], with_=[])
    # in turn, so that other work on the machine meets both
    for _ in range(repeats):
        for key, run in dict(without=without, with_=with_).items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    before, after = (min(seconds[key]) for key in ('without', 'with_'))
    print(f'| {name} | {before:.2f} | {after:.2f} | {after / before:.2f} |', flush=True)


def main() -> None:
    args = parse_args()
    simplefilter('ignore')
    folder = tempfile.mkdtemp(dir=args.folder)
    content = tensors(args.megabytes)
    file, directory = osp.join(folder, 'iter_1.pth'), osp.join(folder, 'iter_2.pth')

    def plain(run: Callable, *where: str) -> None:
        with mock.patch.multiple('mmfgm.engine.checkpoint', **dict.fromkeys(where, _nothing)):
            run()

    def save() -> None:
        save_file(content, file)

    def shard() -> None:
        save_directory(content, dict(meta={}), directory)

    def load(check: bool) -> None:
        touch(read_pickle(file, wanted=lambda part: check))

    def network() -> None:
        touch(read_state_dict(file, network='generator'))

    def unchecked_network() -> None:
        with mock.patch('mmfgm.models.weights._is_of', lambda name: _no):
            network()

    def load_directory(check: bool) -> None:
        if check:
            check_shards(directory, read_pickle(osp.join(directory, EXTRAS)))
        load_shards(dict(content), directory, no_dist=True)

    try:
        print(f'{args.megabytes} MB, {args.repeats} repeats')
        print('| | seconds without checksums | with | ratio |\n| --- | --- | --- | --- |')
        compare('save a file', args.repeats, lambda: plain(save, 'checksums_of'), save)
        compare('load it', args.repeats, lambda: load(False), lambda: load(True))
        compare('load one network', args.repeats, unchecked_network, network)
        compare(
            'save a directory',
            args.repeats,
            lambda: plain(shard, 'shard_checksums', 'index_checksum'),
            shard,
        )
        compare(
            'load it', args.repeats, lambda: load_directory(False), lambda: load_directory(True)
        )
        compare(
            'SHA-256 of an export',
            args.repeats,
            lambda: touch(read_pickle(file, wanted=_no)),
            lambda: (sha256(file), touch(read_pickle(file, wanted=_no))),
        )
    finally:
        shutil.rmtree(folder)


def _nothing(*args: object) -> dict:
    return {}


def _no(part: str) -> bool:
    return False


if __name__ == '__main__':
    main()
