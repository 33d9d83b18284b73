# Copyright (c) mmfgm authors.
"""Files that no disk made: absurd, hostile, or no files at all. One message each, nothing run,
nothing changed, nothing waited for, and no more memory than the file has."""

import io
import os
import pathlib
import pickle
import shutil
import threading
import zipfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorProperties

from mmfgm.errors import DamagedError, UsageError
from mmfgm.models import checksums, read_edm_pickle, read_pickle, read_state_dict, sharded_shapes
from mmfgm.models.checksums import CHECKSUMS, checksum, checksums_of
from mmfgm.models.sharded import NAMES, read_index

LIMIT = 120


def finish(read):
    """Call ``read`` with a limit: to wait for ever is one of the failures."""
    found = []

    def run():
        try:
            found.append(read())
        except BaseException as e:
            found.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert found, 'still waiting'
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def doubled(depth):
    value = [0]
    for _ in range(depth):
        value = [value, value]
    return value


STATE = {'generator.w': torch.ones(3)}


@pytest.mark.parametrize(
    'content',
    [
        [1, 2],
        'text',
        7,
        None,
        torch.ones(2),
        dict(state_dict=[1]),
        dict(state_dict='text'),
        dict(state_dict={'w': 'text'}),
        dict(state_dict={3: torch.ones(1)}),
        dict(state_dict=STATE, checksums=[1]),
        dict(state_dict=STATE, checksums={}),
        dict(state_dict=STATE, checksums={'state_dict.generator': 7}),
        dict(state_dict=STATE, meta=dict(mmfgm='1', checksums=True)),
        dict(state_dict=doubled(60), checksums={'state_dict': '0'}),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_absurd_content(content, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(UsageError, match='w.pth'):
        finish(lambda: read_state_dict(str(tmp_path / 'w.pth')))


@pytest.mark.parametrize('entry', ['state_dict', 'other'])
def test_deep_nesting(entry, tmp_path):
    """20,000 lists in one another; Python's own walks end at 1,000."""
    deep = b']' * 20_000 + b'a' * 19_999
    key = b'X' + len(entry).to_bytes(4, 'little') + entry.encode()
    none = b'X' + (9).to_bytes(4, 'little') + b'checksums' + b'}' + key + b'K\x00s'
    with zipfile.ZipFile(tmp_path / 'w.pth', 'w') as archive:
        archive.writestr('w/data.pkl', b'\x80\x02}' + key + deep + b's' + none + b's.')
        archive.writestr('w/version', '3')
    with pytest.raises(DamagedError):
        finish(lambda: read_pickle(str(tmp_path / 'w.pth')))
    with pytest.raises(UsageError):
        read_state_dict(str(tmp_path / 'w.pth'))


def test_small_files_that_unfold_into_large_ones(monkeypatch):
    monkeypatch.setattr(checksums, 'MOST_VALUES', 10_000)
    with pytest.raises(ValueError, match='more than 10000 values'):
        checksum(doubled(60))


@pytest.mark.parametrize('content', [b'', b'.', b'\x80', b'PK\x03\x04', b'PK\x05\x06' + bytes(18)])
@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors', 'w.pkl', 'last_checkpoint'])
def test_absurd_bytes(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    read = read_edm_pickle if name.endswith('pkl') else read_state_dict
    path = tmp_path if name == 'last_checkpoint' else tmp_path / name
    with pytest.raises(UsageError):
        read(str(path))


def make_sharded(folder):
    dcp.save(dict(state_dict=STATE), checkpoint_id=str(folder), no_dist=True)
    torch.save({}, folder / 'extras.pth')


PARTS = ('.metadata', 'extras.pth', '__0_0.distcp')


@pytest.mark.parametrize(
    'name',
    ['w.pth', 'w.safetensors', 'w.pkl', 'dcp/.metadata', 'dcp/extras.pth', 'dcp/__0_0.distcp'],
)
@pytest.mark.parametrize('what', ['pipe', 'loop', 'folder', 'device'])
def test_what_is_no_file(name, what, tmp_path):
    make_sharded(tmp_path / 'dcp')
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if what == 'pipe':
        os.mkfifo(path)
    elif what == 'loop':
        path.symlink_to(path)
    elif what == 'device':
        path.symlink_to('/dev/zero')
    else:
        path.mkdir()
    read = read_edm_pickle if name.endswith('pkl') else read_state_dict
    with pytest.raises(UsageError):
        finish(lambda: read(str(tmp_path / 'dcp' if name.startswith('dcp') else path)))


def test_bombs(tmp_path):
    """A compressed archive, and a view of a million times the numbers that are there."""
    torch.save(dict(state_dict={'w': torch.zeros(1 << 20)}), tmp_path / 'w.pth')
    with (
        zipfile.ZipFile(tmp_path / 'w.pth') as plain,
        zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.namelist():
            bomb.writestr(record, plain.read(record))
    with pytest.raises(DamagedError, match='compressed'):
        read_state_dict(str(tmp_path / 'bomb.pth'))
    wide = dict(state_dict={'w': torch.zeros(1).expand(1 << 40)})
    torch.save({**wide, CHECKSUMS: {'state_dict.w': '0'}}, tmp_path / 'wide.pth')
    with pytest.raises(DamagedError, match='has not so many numbers'):
        read_state_dict(str(tmp_path / 'wide.pth'))


def test_an_index_that_claims_more_than_there_is(tmp_path):
    make_sharded(tmp_path / 'dcp')
    index = tmp_path / 'dcp' / '.metadata'
    metadata = pickle.loads(index.read_bytes())
    metadata.state_dict_metadata['state_dict.generator.w'].size = torch.Size([1 << 50])
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedError, match='has only'):
        read_state_dict(str(tmp_path / 'dcp'))


@pytest.mark.parametrize('path', ['../w.distcp', '/etc/passwd', '__0_0.distcp/../__0_0.distcp'])
def test_an_index_that_leads_elsewhere(path, tmp_path):
    make_sharded(tmp_path / 'dcp')
    index = tmp_path / 'dcp' / '.metadata'
    metadata = pickle.loads(index.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = path
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedError, match='a file of another name'):
        read_state_dict(str(tmp_path / 'dcp'))


def text(value):
    return b'\x8c' + bytes([len(value)]) + value.encode()


# BUILD on a class: pickle sets its attributes, for the whole process
@pytest.mark.parametrize(
    'module, name, attribute',
    [
        ('pathlib', 'PosixPath', 'unlink'),
        ('torch.distributed.checkpoint.metadata', 'Metadata', '__init__'),
        ('torch.distributed.checkpoint.metadata', 'TensorProperties', '__setstate__'),
        ('torch.distributed.checkpoint.filesystem', '_StorageInfo', '__getstate__'),
        ('collections', 'OrderedDict', 'items'),
        ('torch', 'Size', 'numel'),
        ('torch', 'float32', 'itemsize'),
        ('torch.serialization', '_get_layout', '__doc__'),
    ],
)
@pytest.mark.parametrize('slots', [True, False], ids=['slots', 'dict'])
def test_an_index_cannot_change_a_class(module, name, attribute, slots, tmp_path):
    make_sharded(tmp_path / 'dcp')
    victims = [pathlib.PosixPath, dcp.Metadata, TensorProperties, torch.Size, *NAMES.values()]
    before = [dict(vars(victim)) for victim in victims if hasattr(victim, '__dict__')]
    one = b'}' + text(attribute) + text('replaced') + b's'
    state = b'N' + one + b'\x86' if slots else one
    build = b'\x80\x04' + text(module) + text(name) + b'\x93' + state + b'b.'
    (tmp_path / 'dcp' / '.metadata').write_bytes(build)
    with pytest.raises(UsageError):
        read_index(str(tmp_path / 'dcp'))
    assert before == [dict(vars(victim)) for victim in victims if hasattr(victim, '__dict__')]
    assert torch.serialization._get_layout.__doc__ != 'replaced'
    (tmp_path / 'file').touch()
    pathlib.PosixPath(tmp_path / 'file').unlink()


def test_torchs_own_index_is_read_as_torch_reads_it(tmp_path):
    make_sharded(tmp_path / 'dcp')
    ours, _ = read_index(str(tmp_path / 'dcp'))
    theirs = dcp.FileSystemReader(tmp_path / 'dcp').read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data
    assert sharded_shapes(str(tmp_path / 'dcp')) == {'state_dict.generator.w': (3,)}


def test_a_missing_shard(tmp_path):
    """torch raises a BaseException for it, which no ``except Exception`` sees."""
    make_sharded(tmp_path / 'dcp')
    shutil.copytree(tmp_path / 'dcp', tmp_path / 'copy')
    (tmp_path / 'copy' / '__0_0.distcp').unlink()
    with pytest.raises(DamagedError):
        read_state_dict(str(tmp_path / 'copy'))
    shard = tmp_path / 'dcp' / '__0_0.distcp'
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(DamagedError):
        read_state_dict(str(tmp_path / 'dcp'))


def test_a_checkpoint_from_before_loads_with_one_warning(tmp_path, caplog):
    torch.save(dict(state_dict=STATE, meta=dict(mmfgm='0.1')), tmp_path / 'old.pth')
    torch.save(dict(state_dict=STATE), tmp_path / 'foreign.pth')
    with caplog.at_level('WARNING'):
        for _ in range(2):
            for name in ('old.pth', 'foreign.pth'):
                assert read_state_dict(str(tmp_path / name)).keys() == STATE.keys()
    assert [record.levelname for record in caplog.records].count('WARNING') <= 1


CONTENT = SimpleNamespace(
    value=dict(
        state_dict={'generator.w': torch.ones(3), 'online.w': torch.zeros(2, 2)},
        optimizer=dict(generator=dict(state={0: dict(step=torch.tensor(1.0))}, lr=1e-3)),
        meta=dict(iter=3, names=('a', 'b'), flag=True, nothing=None),
    )
)


def test_every_change_is_seen():
    found = checksums_of(CONTENT.value)
    assert set(found) == {
        'state_dict.generator',
        'state_dict.online',
        'optimizer.generator',
        'meta',
    }
    values = [
        1,
        True,
        1.0,
        '1',
        b'1',
        None,
        [1],
        (1,),
        [[1]],
        [1, 1],
        {1: 1},
        {'1': 1},
        {1: 1, 2: 2},
        {2: 2, 1: 1},
        [],
        (),
        {},
        0.0,
        -0.0,
        torch.float32,
        torch.ones(1),
        torch.ones(1, 1),
        torch.ones(1, dtype=torch.float64),
        torch.ones(()),
        -torch.zeros(1),
        torch.zeros(1),
        [torch.ones(1), torch.zeros(1)],
        [torch.zeros(1), torch.ones(1)],
    ]
    assert len({checksum(value) for value in values}) == len(values)
    buffer = io.BytesIO()
    torch.save(CONTENT.value, buffer)
    buffer.seek(0)
    assert checksums_of(torch.load(buffer, weights_only=True)) == found


def test_one_network_is_checked_alone(tmp_path):
    content = {**CONTENT.value, CHECKSUMS: checksums_of(CONTENT.value)}
    content['state_dict'] = {**content['state_dict'], 'online.w': torch.ones(2, 2)}
    torch.save(content, tmp_path / 'w.pth')
    assert read_state_dict(str(tmp_path / 'w.pth'), network='generator')['w'].eq(1).all()
    for read in (
        lambda: read_state_dict(str(tmp_path / 'w.pth'), network='online'),
        lambda: read_pickle(str(tmp_path / 'w.pth')),
    ):
        with pytest.raises(DamagedError, match='state_dict.online has the checksum'):
            read()
