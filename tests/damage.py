# Copyright (c) mmfgm authors.
"""Damage to files: what disks, networks and interrupted copies do to what we store.

``damage`` is a function of a file's bytes and a seed; ``damages()`` is the same as a strategy of
hypothesis, which shrinks what it finds. A reader passes where ``outcome`` says that the content is
right or that it was refused with a ``UsageError``. Examples are the same at every run;
``MMFGM_FUZZ=10000`` tries that many, at random.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mmfgm.errors import UsageError

PAGE = 4096


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def zero_page(data: bytes, rng: random.Random) -> bytes:
    """4 KiB that the disk never wrote."""
    at = rng.randrange(len(data))
    hole = data[at : at + PAGE]
    return data[:at] + bytes(len(hole)) + data[at + PAGE :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _block(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.randint(1, PAGE))


def duplicate_block(data: bytes, rng: random.Random) -> bytes:
    start, end = _block(data, rng)
    return data[:end] + data[start:]


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    """Two blocks of equal length in each other's place."""
    size = rng.randint(1, max(1, min(PAGE, len(data) // 2)))
    first = rng.randint(0, max(0, len(data) - 2 * size))
    second = rng.randint(first + size, max(first + size, len(data) - size))
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, PAGE))


def scramble(data: bytes, rng: random.Random) -> bytes:
    """A block of noise."""
    start, end = _block(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    function.__name__: function
    for function in (
        flip_bit,
        zero_page,
        truncate,
        duplicate_block,
        swap_blocks,
        append,
        scramble,
    )
}


def damage(data: bytes, kind: str, seed: int) -> bytes:
    """``data`` (not empty) with one damage of ``DAMAGES``, the same for the same seed; it may be
    ``data`` itself, as where zeros are zeroed."""
    return DAMAGES[kind](data, random.Random(f'{kind} {seed}'))


def damages() -> st.SearchStrategy[tuple[str, int]]:
    """The arguments of :func:`damage` after the bytes."""
    return st.tuples(st.sampled_from(sorted(DAMAGES)), st.integers(0, 2**32 - 1))


def fuzzed(examples: int) -> settings:
    """How a test with ``@given`` runs: ``examples`` fixed ones, or ``MMFGM_FUZZ`` random ones."""
    more = int(os.environ.get('MMFGM_FUZZ', 0))
    return settings(
        max_examples=more or examples,
        derandomize=not more,
        print_blob=True,
        deadline=None,
        # the undamaged file is made once for all examples
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def outcome(read: Callable[[], Any], is_right: Callable[[Any], bool]) -> str:
    """``'detected'``, ``'harmless'`` (the content is right) or ``'silently wrong'``.

    Any other error than a ``UsageError`` passes through: it is a defect of the reader.
    """
    try:
        content = read()
    except UsageError:
        return 'detected'
    return 'harmless' if is_right(content) else 'silently wrong'


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to size and time of all files below a folder: whether a reader touched any."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob('*'))
    }
