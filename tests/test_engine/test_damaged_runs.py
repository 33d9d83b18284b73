# Copyright (c) mmfgm authors.
"""A run whose last checkpoint is damaged says so and names the one to go on from, on every
process."""

import shutil

import pytest

from tests.conftest import train


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
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
    assert result.stderr.count('error:') == 1
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
