# Copyright (c) mmfgm authors.
"""Files and folders that appear only when whole, and what is left where that fails."""

import errno
import json
import os
import shutil
import stat

import pytest

from mmfgm.errors import UsageError
from mmfgm.files import (
    asset_path,
    differences,
    read_json,
    sha256,
    whole_file,
    whole_folder,
    write_file,
)


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / 'file'
    write_file(str(path), 'old')
    with pytest.raises(KeyboardInterrupt), whole_file(str(path)) as unfinished:
        with open(unfinished, 'w') as f:
            f.write('half')
        raise KeyboardInterrupt
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, replace = [], os.replace
    monkeypatch.setattr(os, 'fsync', lambda f: flushed.append(os.readlink(f'/proc/self/fd/{f}')))

    def replace_flushed(source, target):
        assert flushed == [source]
        replace(source, target)

    monkeypatch.setattr(os, 'replace', replace_flushed)
    write_file(str(tmp_path / 'file'), b'content')
    assert flushed[1:] == [str(tmp_path)]


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    """Also where its writer makes a new file that only its owner may read, as safetensors does."""
    mask = os.umask(0o027)
    try:
        with whole_file(str(tmp_path / 'file')) as unfinished:
            os.remove(unfinished)
            os.close(os.open(unfinished, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / 'file').stat().st_mode) == 0o640


def test_a_file_that_cannot_be_written_is_a_message(tmp_path):
    with pytest.raises(UsageError, match="nowhere/file' cannot be written"):
        write_file(str(tmp_path / 'nowhere/file'), b'')


@pytest.mark.parametrize('content', [b'{', b'\xff', b'[' * 100_000, None])
def test_json_that_cannot_be_read_is_a_message(content, tmp_path):
    path = tmp_path / 'file.json'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="file.json' (is damaged|cannot be read) .*; delete it"):
        read_json(str(path), 'delete it')


def test_differences_are_named_by_their_path():
    found = dict(a=dict(b=1, c=2), d=3)
    assert list(differences(dict(a=dict(b=1, c=4), d=3), found)) == ['a.c is 2, expected 4']
    assert list(differences(found, found)) == []


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
        if target == str(out) and not source.endswith('.old.tmp'):
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


@pytest.mark.parametrize('force', [False, True])
def test_what_takes_the_name_meanwhile_is_not_replaced(force, tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(UsageError, match='exists' if not force else 'holds no marker'):
        with whole_folder(str(out), force, 'marker') as unfinished:
            (tmp_path / os.path.basename(unfinished) / 'marker').write_text('ours')
            out.mkdir()
            (out / 'thesis.txt').write_text("somebody else's")
    assert [path.name for path in tmp_path.rglob('*')] == ['out', 'thesis.txt']


@pytest.fixture(params=['.mim/assets', '../assets'])
def assets(request, tmp_path, monkeypatch):
    """A wheel's or a clone's assets, with one file."""
    monkeypatch.setattr('mmfgm.files.__file__', str(tmp_path / 'mmfgm' / 'files.py'))
    folder = (tmp_path / 'mmfgm' / request.param).resolve()
    (folder / 'a').mkdir(parents=True)
    (folder / 'a/b.safetensors').write_bytes(b'weights')
    entry = dict(sha256=sha256(str(folder / 'a/b.safetensors')))
    (folder / 'assets.json').write_text(json.dumps({'a/b.safetensors': entry}))
    return folder


def test_assets_are_found(assets):
    assert asset_path('mmfgm::assets/a/b.safetensors') == str(assets / 'a/b.safetensors')
    assert asset_path('work_dirs/a') == 'work_dirs/a'


def test_assets_that_are_not_the_released_ones(assets):
    (assets / 'a/b.safetensors').write_bytes(b'Weights')
    with pytest.raises(UsageError, match=r'has the SHA-256 .*not .*git checkout assets'):
        asset_path('mmfgm::assets/a/b.safetensors')
    (assets / 'a/b.safetensors').unlink()
    with pytest.raises(UsageError, match=r'is missing.*git checkout assets'):
        asset_path('mmfgm::assets/a/b.safetensors')
    for name in ('a/c.safetensors', '../assets.json', ''):
        with pytest.raises(UsageError, match='name one of mmfgm::assets/a/b.safetensors'):
            asset_path(f'mmfgm::assets/{name}')


def test_no_assets_at_all(assets):
    (assets / 'assets.json').unlink()
    with pytest.raises(UsageError, match='has no assets; install it again'):
        asset_path('mmfgm::assets/a/b.safetensors')
