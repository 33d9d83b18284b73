# Copyright (c) mmfgm authors.
"""The damages that other tests do are damages, and can be repeated."""

import random

import pytest

from mmfgm.errors import UsageError

from .damage import DAMAGES, damage, outcome

DATA = random.Random(0).randbytes(20_000)


@pytest.mark.parametrize('kind', DAMAGES)
def test_a_seed_says_which_damage(kind):
    damaged = [damage(DATA, kind, seed) for seed in range(20)]
    assert damaged == [damage(DATA, kind, seed) for seed in range(20)]
    assert DATA not in damaged and len(set(damaged)) > 10
    for short in (b'a', b'ab', b'abc'):
        for seed in range(20):
            damage(short, kind, seed)


def test_lengths_are_of_their_kind():
    for seed in range(20):
        assert len(damage(DATA, 'truncate', seed)) < len(DATA) < len(damage(DATA, 'append', seed))
        swapped = damage(DATA, 'swap_blocks', seed)
        assert len(swapped) == len(DATA) and sorted(swapped) == sorted(DATA)
        flipped = damage(DATA, 'flip_bit', seed)
        assert sum((a ^ b).bit_count() for a, b in zip(flipped, DATA)) == 1


def test_outcomes():
    def refuse():
        raise UsageError('damaged; download it again')

    assert outcome(refuse, lambda _: True) == 'detected'
    assert outcome(lambda: 1, lambda content: content == 1) == 'harmless'
    assert outcome(lambda: 2, lambda content: content == 1) == 'silently wrong'
    with pytest.raises(ZeroDivisionError):
        outcome(lambda: 1 / 0, lambda _: True)
