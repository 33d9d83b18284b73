# Copyright (c) mmfgm authors.
"""Folders that appear only when whole, and what is left where that fails."""

import errno
import os
import shutil

import pytest

from mmfgm.apis.artifacts import whole_folder
from mmfgm.errors import UsageError


@pytest.fixture
def out(tmp_path):
    """A folder that may be replaced."""
    path = tmp_path / 'out'
    path.mkdir()
    (path / 'marker').write_text('old')
    return path


def replace(out):
    with whole_folder(str(out), True, 'marker') as folder:
        with open(f'{folder}/marker', 'w') as f:
            f.write('new')


def test_the_old_folder_makes_place(out):
    replace(out)
    assert (out / 'marker').read_text() == 'new' and os.listdir(out.parent) == ['out']


@pytest.mark.parametrize(
    'error, raised',
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UsageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_the_old_folder_comes_back_where_the_new_one_gets_no_name(out, monkeypatch, error, raised):
    rename = os.rename

    def fail(source, target):
        if source.endswith('.tmp'):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, 'rename', fail)
    with pytest.raises(raised):
        replace(out)
    assert (out / 'marker').read_text() == 'old' and os.listdir(out.parent) == ['out']


def test_only_what_fails_in_writing_is_about_the_folder(out, tmp_path):
    """A file that cannot be read has its own error, whose traceback says what wanted it."""
    with pytest.raises(FileNotFoundError, match='nowhere'), whole_folder(str(out), True, 'marker'):
        open(tmp_path / 'nowhere')
    with (
        pytest.raises(UsageError, match='cannot be written: .*make room'),
        whole_folder(str(out), True, 'marker') as folder,
    ):
        open(f'{folder}/no/such/folder', 'w')
    full = shutil.Error(
        [('a', 'b', str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))]
    )  # of copytree
    with (
        pytest.raises(UsageError, match='cannot be written: .*make room'),
        whole_folder(str(out), True, 'marker'),
    ):
        raise full
    assert (out / 'marker').read_text() == 'old' and os.listdir(tmp_path) == ['out']
