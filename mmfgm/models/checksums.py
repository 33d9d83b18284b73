# Copyright (c) mmfgm authors.
"""Checksums of what a checkpoint holds, so that damage to it never becomes somebody's weights.

They are of the content rather than of the file: whatever happens to the bytes, either the tensors
and values that come out are those that went in, or it is noticed. One for each network and each
optimizer lets a reader of one network check that one alone.

CRC-32 finds every damage of up to 32 bits in a row, and misses a larger one once in 4 billion; it
takes half the time of SHA-256 where the CPU computes that in hardware, and far less elsewhere. A
longer digest would add nothing: whoever can change a checkpoint can also change what is written in
it.
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmfgm.errors import DamagedError

# entry of a checkpoint
CHECKSUMS = 'checksums'
# Entries whose parts have a checksum each: the networks' tensors, and the optimizers.
DIVIDED = ('state_dict', 'optimizer')
# Values in one part of a checkpoint, of which plain ones in a list count as a sixteenth: a small
# file of lists that contain one another can have any number.
MOST_VALUES = 1_000_000
PLAIN = (bool, int, float, str, bytes, type(None))
EDITED = f'(if you changed it yourself, set its {CHECKSUMS!r} to None)'


def part_of(name: str) -> str:
    """The part of a checkpoint that a tensor belongs to, ``'state_dict.generator'`` for
    ``'state_dict.generator.network.input.weight'``."""
    return '.'.join(name.split('.')[:2])


def _bytes(value: Tensor) -> Any:
    """The memory of a tensor, as a buffer."""
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise ValueError(f'a tensor of {tuple(value.shape)} that has not so many numbers')
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def checksum(value: Any) -> str:
    """CRC-32 of tensors and plain values in any containers: their types, order and content.

    Of values of other types only the type counts.

    Raises:
        ValueError: If there are more than :data:`MOST_VALUES`, or a tensor has more numbers than
            its storage.
    """
    crc = 0
    count = 0
    # not recursive: a damaged or hostile file may nest a million levels
    stack = [value]
    while stack:
        value = stack.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f'more than {MOST_VALUES} values')
        crc = zlib.crc32(type(value).__name__.encode(), crc)
        if isinstance(value, Tensor):
            crc = zlib.crc32(f'{value.dtype}{tuple(value.shape)}'.encode(), crc)
            crc = zlib.crc32(_bytes(value), crc)
        elif isinstance(value, dict):
            crc = zlib.crc32(b'%d' % len(value), crc)
            for pair in reversed(value.items()):
                stack += reversed(pair)
        elif isinstance(value, (list, tuple)) and all(type(inner) in PLAIN for inner in value):
            # the random states have thousands of numbers
            count += len(value) // 16
            crc = zlib.crc32(repr(tuple(value)).encode(), crc)
        elif isinstance(value, (list, tuple)):
            crc = zlib.crc32(b'%d' % len(value), crc)
            stack += reversed(value)
        elif isinstance(value, (*PLAIN, torch.dtype, torch.device)):
            crc = zlib.crc32(f'{value!r};'.encode(), crc)
    return f'{crc:08x}'


def _divide(content: dict) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for key, value in content.items():
        if key in DIVIDED and isinstance(value, dict):
            for name, inner in value.items():
                parts.setdefault(part_of(f'{key}.{name}'), {})[name] = inner
        elif key != CHECKSUMS:
            parts[key] = value
    return parts


def checksums_of(content: dict) -> dict[str, str]:
    """One for each part of a checkpoint: each network, each optimizer, and every other entry."""
    return {part: checksum(value) for part, value in _divide(content).items()}


def check_content(
    content: dict, filename: str, wanted: Callable[[str], bool] = lambda part: True
) -> None:
    """Hold what was read against the checksums in it.

    A checkpoint of an earlier version has none; it is taken, with a warning. One of this version
    says in its ``meta`` that it has, so that none loses them unseen.

    Args:
        content (dict): What :func:`checksums_of` was called with, and its result as
            :data:`CHECKSUMS`.
        filename (str): For messages.
        wanted (callable): Which parts to check. Defaults to all.

    Raises:
        DamagedError: Names the first part that is not what was saved.
    """
    recorded = content.get(CHECKSUMS)
    if recorded is None:
        meta = content.get('meta')
        # files of other programs never had any
        if isinstance(meta, dict) and 'mmfgm' in meta:
            if CHECKSUMS in meta and CHECKSUMS not in content:
                raise DamagedError(filename, f'it has lost its checksums {EDITED}')
            warn_unchecked(filename)
        return
    parts = _divide(content)
    # whole entries may have been taken out, to share the rest
    if not isinstance(recorded, dict) or not recorded.keys() >= parts.keys():
        raise DamagedError(filename, f'its parts are not those that were saved {EDITED}')
    for part, value in parts.items():
        if wanted(part):
            try:
                found = checksum(value)
            except (ValueError, RuntimeError, MemoryError, RecursionError) as e:
                raise DamagedError(filename, f'{part}: {e!r}') from e
            compare(filename, part, recorded[part], found)


def compare(filename: str, part: str, recorded: Any, found: str) -> None:
    """Hold one checksum against what was recorded when the file was written.

    Raises:
        DamagedError: If they differ.
    """
    if found != recorded:
        raise DamagedError(
            filename,
            f'{part} has the checksum {found}, but was saved with {str(recorded)[:80]} {EDITED}',
        )


@cache
def warn_unchecked(filename: str) -> None:
    """Say once that a file has no checksums."""
    print_log(
        f'{filename!r} was written before checkpoints had checksums: damage to it would not be'
        ' noticed. The next checkpoint has them.',
        'current',
        logging.WARNING,
    )


def range_checksum(path: str, ranges: Iterable[tuple[int, int]]) -> str:
    """CRC-32 of parts of a file.

    Args:
        path (str): The file.
        ranges: Offset and length of each, in bytes.

    Raises:
        OSError: If it cannot be read.
    """
    crc = 0
    with open(path, 'rb') as file:
        for offset, length in sorted(ranges):
            crc = zlib.crc32(b'%d,%d;' % (offset, length), crc)
            file.seek(offset)
            for block in _blocks(file, length):
                crc = zlib.crc32(block, crc)
    return f'{crc:08x}'


def _blocks(file: Any, length: int) -> Iterator[bytes]:
    while length > 0:
        block = file.read(min(length, 1 << 20))
        if not block:
            return
        length -= len(block)
        yield block


def fingerprint(network: nn.Module) -> str:
    """CRC-32 of a network's weights: tells whether a resumed run has the teacher it was started
    with.

    All processes must call it together on a network that is sharded over them.
    """
    crc = 0
    for value in network.state_dict().values():
        crc = zlib.crc32(_bytes(value.full_tensor() if isinstance(value, DTensor) else value), crc)
    return f'{crc:08x}'
