# Copyright (c) mmfgm authors.
"""A run whose last checkpoint is damaged says so and names the one to go on from, on every
process."""

import shutil
import struct
import zipfile

import pytest

from tests.conftest import train


def flip(path):
    """A bit that counts: in the middle of the largest entry of a zip, as the space between entries
    holds nothing, or of another file."""
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        # name and extra field stand between the 30 bytes of an entry's header and its content
        name, extra = struct.unpack_from('<HH', data, entry.header_offset + 26)
        at = entry.header_offset + 30 + name + extra + entry.file_size // 2
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_resuming_offers_the_newest_whole_checkpoint(tiny, tmp_path):
    run = tmp_path / 'run'
    train(
        tiny / 'fgm.py', run, 'train_cfg.max_iters=6', 'default_hooks.checkpoint.max_keep_ckpts=-1'
    )
    flip(run / 'iter_6.pth')
    (run / 'iter_4.pth').write_bytes(b'')
    result = train(tiny / 'fgm.py', run, resume=True, codes=(2,))
    whole = run / 'iter_2.pth'
    assert f'--resume {whole}' in result.stderr and 'Traceback' not in result.stderr
    # one error, told once: its words may hold those of torch, which say 'error:' themselves
    assert sum(line.startswith('error: ') for line in result.stderr.splitlines()) == 1
    # nothing went back in silence
    assert 'iter_6.pth' in (run / 'last_checkpoint').read_text()
    train(tiny / 'fgm.py', run, resume=whole)
    assert (run / 'iter_8.pth').exists()


@pytest.mark.slow
def test_all_processes_end_where_one_finds_damage(tiny, tmp_path):
    """Each reads other shards: one that stops alone would leave the others waiting for it."""
    run = tmp_path / 'run'
    options = ('strategy.type=FSDP2Strategy', 'strategy.block_types=AdaLNBlock,')
    train(tiny / 'fgm.py', run, *options, 'train_cfg.max_iters=4', nproc=2)
    shutil.copytree(run / 'iter_4.pth', tmp_path / 'whole')
    for name in ('__1_0.distcp', '.metadata', 'extras.pth'):
        shutil.rmtree(run / 'iter_4.pth')
        shutil.copytree(tmp_path / 'whole', run / 'iter_4.pth')
        flip(run / 'iter_4.pth' / name)
        result = train(
            tiny / 'fgm.py', run, *options, nproc=2, resume=True, codes=None, timeout=300
        )
        assert result.returncode not in (0, None), name
        assert f'--resume {run / "iter_2.pth"}' in result.stderr, name
        # torch's launcher prints tracebacks of its own, of which none is ours
        assert 'mmfgm/engine' not in result.stderr
