# Copyright (c) mmfgm authors.
"""Damage of any sort to anything that we store is noticed, or changes nothing.

``MMFGM_FUZZ=10000 pytest tests/test_fuzz.py`` tries as many damages of each kind, at random.
"""

import pytest
from hypothesis import given

from .damage import damages, fuzzed, snapshot
from .damage_kinds import KINDS, Sample


@pytest.fixture(scope='module', params=KINDS)
def sample(request, tmp_path_factory):
    return Sample(request.param, tmp_path_factory.mktemp('kind') / 'files')


@given(damages())
@fuzzed(40)
def test_damage_is_noticed_or_harmless(sample, which):
    before = set(snapshot(sample.folder.parent))
    assert sample.try_damage(*which) != 'silently wrong'
    assert set(snapshot(sample.folder.parent)) == before
