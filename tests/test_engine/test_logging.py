# Copyright (c) mmfgm authors.
"""The config of docs/logging.md for Weights & Biases, in its offline mode."""

import json
import re
import struct

import pytest

from tests.conftest import ROOT, tool_env, train

BLOCK = 32768
LAST_PARTS = (1, 4)  # a record in one part, the last part of one


def records(path):
    """Records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b''
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:  # padding, for no header fits in
            position += left
            continue
        length, kind = struct.unpack('<HB', data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in LAST_PARTS:
            yield Record.FromString(parts)
            parts = b''


def entries(items):
    return {
        item.key or '/'.join(item.nested_key): json.loads(item.value_json)
        for item in items
        if item.value_json
    }


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wandb')
    page = (ROOT / 'docs/logging.md').read_text()
    config = re.search(r'^```python\n(# my_wandb\.py\n.*?)^```$', page, re.MULTILINE | re.DOTALL)
    (folder / 'my_wandb.py').write_text(config[1])
    options = (
        'model.network.width=16',
        'model.network.depth=2',
        'train_cfg.max_iters=4',
        'train_dataloader.batch_size=8',
        'default_hooks.logger.interval=1',
        'default_hooks.samples.interval=4',
        'evaluations.fd.interval=2',
        'evaluations.fd.dataset.num_samples=70',
    )
    env = tool_env(WANDB_MODE='offline', WANDB_SILENT='true')
    train(folder / 'my_wandb.py', folder / 'run', *options, env=env)
    return folder / 'run'


@pytest.mark.slow
def test_wandb_has_what_the_work_dir_has(work_dir):
    (path,) = work_dir.glob('*/vis_data/wandb/offline-run-*/*.wandb')
    recorded = list(records(path))
    kinds = [record.WhichOneof('record_type') for record in recorded]
    assert kinds[0] == 'header' and kinds[-1] == 'exit'  # closed, not killed
    rows = [entries(r.history.item) for r in recorded if r.HasField('history')]
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    losses = {row['iter']: row['network/loss_fm'] for row in rows if 'network/loss_fm' in row}
    assert losses == {row['iter']: row['network/loss_fm'] for row in kept if 'iter' in row}
    assert sorted(losses) == [1, 2, 3, 4]
    scores = [row['fd/fd'] for row in rows if 'fd/fd' in row]
    assert scores == [row['fd/fd'] for row in kept if 'fd/fd' in row] and len(scores) == 2
    config = {}
    for record in recorded:
        config.update(entries(record.config.update))
    assert config['train_cfg']['max_iters'] == 4
    defined = [record.metric for record in recorded if record.HasField('metric')]
    assert any(m.glob_name == '*' and m.step_metric == 'iter' for m in defined)


@pytest.mark.slow
def test_wandb_has_the_pictures(work_dir):
    (mine,) = work_dir.glob('*/vis_data/vis_image/samples_4.png')
    (theirs,) = work_dir.glob('*/vis_data/wandb/offline-run-*/files/media/images/samples_*.png')
    from PIL import Image

    assert Image.open(mine).convert('RGB').tobytes() == Image.open(theirs).tobytes()
