# Copyright (c) mmfgm authors.
"""Files that are absurd, but harmless: one message each, in bounded memory and time."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image

from mmfgm.apis import export_generator, read_config
from mmfgm.apis.artifacts import EXPORT_FILE, read_export
from mmfgm.apis.config import read_dump
from mmfgm.apis.report.curves import curves_svg
from mmfgm.apis.report.data import read_run
from mmfgm.caches.sources import ImageFiles, read_image, read_prompts
from mmfgm.datasets import CachedLatents, ImageFolder
from mmfgm.errors import UsageError
from mmfgm.evaluation.features import Pixels
from mmfgm.evaluation.geneval.folder.layout import (
    Entry,
    VerdictLog,
    read_results,
    result_row,
    scan_folder,
)
from mmfgm.evaluation.geneval.judging.prompts import read_metadata
from mmfgm.evaluation.reference import Reference, load_reference, save_reference
from mmfgm.files import files_below, read_json, sha256
from mmfgm.models import read_edm_pickle, read_pickle, read_state_dict
from tests.batches import same
from tests.damage import damage, damages, fuzzed, outcome
from tests.test_apis.conftest import digits  # noqa: F401 - a fixture
from tests.test_datasets.test_cached import make as make_cache

DEEP = '[' * 100_000
PIPED = {
    'checkpoint': lambda path: read_state_dict(path),
    'pickle': lambda path: read_pickle(path),
    'EDM network': lambda path: read_edm_pickle(path),
    'JSON': lambda path: read_json(path, 'make it again'),
    'statistics': lambda path: load_reference(path, Pixels()),
    'results': lambda path: read_results(path),
    'GenEval prompts': lambda path: read_metadata(path),
    'dump': lambda path: read_dump(path),
    'archive of images': lambda path: ImageFiles(path),
    'dataset': lambda path: ImageFolder(path),
    **{name: lambda path: read_prompts(path, 'prompt') for name in ('.txt', '.csv', '.parquet')},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize('name', PIPED)
def test_a_pipe_is_not_waited_for(name, tmp_path):
    path = tmp_path / f'file{name if name.startswith(".") else ".zip"}'
    os.mkfifo(path)
    with pytest.raises(UsageError, match='is a pipe'):
        PIPED[name](str(path))


@pytest.mark.timeout(120)
def test_pipes_among_images_and_metadata_are_named(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    with pytest.raises(UsageError, match="a.png' is a pipe|a.png cannot be read"):
        ImageFolder(str(tmp_path), labels=False)
    with pytest.raises(UsageError, match="a.png' is a pipe"):
        ImageFiles(str(tmp_path)).read('a.png')
    (tmp_path / '00000').mkdir()
    os.mkfifo(tmp_path / '00000' / 'metadata.jsonl')
    with pytest.raises(UsageError, match="metadata.jsonl' is a pipe"):
        scan_folder(str(tmp_path))


ENTRY = Entry('00000/samples/0000.png', dict(tag='t', include=[], prompt='p'))
ROW = dict(result_row(ENTRY), filename=ENTRY.name)
BAD_ROWS = {
    'a text that counts as true': dict(ROW, correct='false'),
    'a number': dict(ROW, correct=1),
    'a list as file name': dict(ROW, filename=['x']),
    'no JSON inside': dict(ROW, metadata='{'),
    'a list inside': dict(ROW, details='[]'),
    'boxes without corners': dict(ROW, details='{"dog": [[1]]}'),
    'nan boxes': dict(ROW, details='{"dog": [[NaN, 0, 1, 1, 0.5]]}'),
}


@pytest.mark.parametrize('row', BAD_ROWS.values(), ids=BAD_ROWS)
def test_results_say_what_they_say(row, tmp_path):
    (tmp_path / 'results.jsonl').write_text(f'{json.dumps(ROW)}\n{json.dumps(row)}\n')
    with pytest.raises(UsageError, match=r'line 2: .* (must be|is)'):
        read_results(str(tmp_path / 'results.jsonl'))


@pytest.mark.parametrize('line', [DEEP, '3', '"correct"', '[]', '\x00', '\udcff'])
def test_rows_that_are_none(line, tmp_path):
    file = tmp_path / 'file.jsonl'
    file.write_text(f'{json.dumps(ROW)}\n{line}', encoding='utf-8', errors='surrogateescape')
    for read in (read_results, read_metadata, lambda path: read_prompts(path, 'prompt')):
        with pytest.raises(UsageError, match=r'file\.jsonl'):
            read(str(file))


@pytest.mark.parametrize('bad', [*BAD_ROWS.values(), 3, DEEP, None], ids=str)
def test_verdicts_of_others_are_judged_again(bad, tmp_path):
    log = VerdictLog(str(tmp_path), dict(detector=1))
    image = tmp_path / ENTRY.name
    image.parent.mkdir(parents=True)
    image.write_bytes(b'picture')
    log.append(
        [bad if isinstance(bad, dict) else ROW],
        [sha256(str(image))],
    )
    (file,) = (tmp_path / 'verdicts').iterdir()
    if not isinstance(bad, dict):
        record = json.loads(file.read_text())
        file.write_text(bad if bad is DEEP else json.dumps(dict(record, row=bad)))
    assert log.read(str(tmp_path), [ENTRY]) == {}


def test_loops_of_links_end(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    for name in ('loop', 'again'):
        (tmp_path / 'a' / 'b' / name).symlink_to(tmp_path)
    Image.new('RGB', (4, 4)).save(tmp_path / 'a' / 'x.png')
    (tmp_path / 'linked').symlink_to(tmp_path / 'a' / 'b')
    assert files_below(str(tmp_path)) == ['a/x.png']
    assert ImageFolder(str(tmp_path), labels=False).names == ['a/x.png']
    assert ImageFiles(str(tmp_path)).images == ['a/x.png']
    # a folder that is linked to twice is no loop
    (tmp_path / 'c').mkdir()
    for name in ('first', 'second'):
        (tmp_path / 'c' / name).symlink_to(tmp_path / 'a')
    found = ImageFolder(str(tmp_path / 'c'), labels=False).names
    assert found == ['first/x.png', 'second/x.png']


def png(*size):
    buffer = io.BytesIO()
    Image.new('RGB', size).save(buffer, format='PNG')
    return buffer.getvalue()


def test_a_picture_like_a_thread(tmp_path):
    with pytest.raises(UsageError, match='is 1x60000 pixels.* cut it'):
        read_image(png(1, 60_000), 512)
    assert read_image(png(20, 60), 16).shape == (3, 16, 16)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / 'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('a.png', 'w', force_zip64=True) as f:
            for _ in range(300):
                f.write(bytes(1 << 20))
    assert os.path.getsize(tmp_path / 'bomb.zip') < 1 << 20
    with pytest.raises(UsageError, match='a.png.* unpacks to 314,572,800 bytes'):
        ImageFolder(str(tmp_path / 'bomb.zip'), labels=False)
    with pytest.raises(UsageError, match='unpacks to 314,572,800 bytes'):
        ImageFiles(str(tmp_path / 'bomb.zip')).read('a.png')


@pytest.mark.parametrize('labels', [DEEP, '[]', '3', '{"labels": 3}', '{"labels": [[[], 0]]}'])
def test_labels_that_are_none(labels, tmp_path):
    (tmp_path / 'a.png').write_bytes(png(4, 4))
    (tmp_path / 'dataset.json').write_text(labels)
    with pytest.raises(UsageError, match='dataset.json must hold'):
        ImageFolder(str(tmp_path))


GOOD = dict(mu=np.zeros(2), sigma=np.eye(2), n=9)
BAD_STATISTICS = {
    'text': dict(GOOD, mu=np.array(['a', 'b'])),
    'a number': dict(GOOD, mu=np.float64(3)),
    'nan': dict(GOOD, sigma=np.full((2, 2), np.nan)),
    'of one': dict(GOOD, n=1),
    'many n': dict(GOOD, n=np.zeros((2, 2))),
    'flat features': dict(GOOD, features=np.zeros(3)),
    'a bomb': dict(GOOD, mu=np.zeros((1 << 25) + 1024)),
}


@pytest.mark.parametrize('content', BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_statistics_that_are_none(content, tmp_path):
    np.savez_compressed(tmp_path / 'stats.npz', **content)
    with pytest.raises(UsageError, match='reference statistics'):
        load_reference(str(tmp_path / 'stats.npz'), Pixels(), keep_features='features' in content)


def test_an_array_is_no_statistics(tmp_path):
    with open(tmp_path / 'stats.npz', 'wb') as f:
        np.save(f, np.zeros(3))
    with pytest.raises(UsageError, match='reference statistics'):
        load_reference(str(tmp_path / 'stats.npz'), Pixels())


@pytest.fixture(scope='module')
def statistics(tmp_path_factory):
    path = tmp_path_factory.mktemp('statistics') / 'stats.npz'
    rng = np.random.default_rng(0)
    mean, cov, features = (torch.from_numpy(rng.normal(size=size)) for size in (8, (8, 8), (20, 8)))
    save_reference(str(path), Reference(mean, cov, 20, features.float()), Pixels())
    return path.read_bytes()


@given(how=damages())
@fuzzed(150)
def test_damaged_statistics(statistics, tmp_path, how):
    def read(content):
        (tmp_path / 'stats.npz').write_bytes(content)
        found = load_reference(str(tmp_path / 'stats.npz'), Pixels(), keep_features=True)
        return dict(mean=found.mean, cov=found.cov, features=found.features)

    right = read(statistics)
    assert (
        outcome(lambda: read(damage(statistics, *how)), lambda found: same(found, right))
        != 'silently wrong'
    )


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache') / 'cache'
    return folder, make_cache(folder)


def read_cache(folder):
    found = CachedLatents(str(folder))
    return found.__getitems__(range(len(found)))


@given(how=damages())
@fuzzed(200)
@pytest.mark.parametrize('name', ['manifest.json', 'shard_000002.safetensors'])
def test_damaged_caches(cache, tmp_path, name, how):
    folder, items = cache
    copy = tmp_path / 'copy'
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(damage((folder / name).read_bytes(), *how))
    result = outcome(lambda: read_cache(copy), lambda found: same(found, items))
    assert result != 'silently wrong'


def test_a_flipped_bit_of_an_item_is_named_when_it_is_read(cache, tmp_path):
    folder, items = cache
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy)
    shard = copy / 'shard_000002.safetensors'
    content = bytearray(shard.read_bytes())
    value = items['x_0'][4].contiguous().view(torch.uint8).numpy().tobytes()
    content[content.index(value) + 3] ^= 16
    shard.write_bytes(content)
    found = CachedLatents(str(copy))
    assert same(found[3], CachedLatents(str(folder))[3])
    with pytest.raises(UsageError, match='x_0 of its item 1 has another checksum'):
        found[4]


def drop(manifest, *keys):
    for key in keys[:-1]:
        manifest = manifest[key]
    del manifest[keys[-1]]


def put(manifest, value, *keys):
    for key in keys[:-1]:
        manifest = manifest[key]
    manifest[keys[-1]] = value


BAD_MANIFESTS = {
    'a path out of the folder': lambda m: put(m, '../../x.safetensors', 'shards', 0, 'file'),
    'a dtype that is a function': lambda m: put(m, 'load', 'settings', 'dtype'),
    'a layout of terabytes': lambda m: put(m, [2**40, 2**40], 'layout', 'x_0'),
    'another layout': lambda m: put(m, [2, 4, 8], 'layout', 'x_0'),
    'a text as layout': lambda m: put(m, '244', 'layout', 'x_0'),
    'no count': lambda m: drop(m, 'count'),
    'another count': lambda m: put(m, 7, 'count'),
    'a start elsewhere': lambda m: put(m, 2, 'shards', 2, 'start'),
    'a list of numbers': lambda m: put(m, [1, 2], 'shards'),
    'no shards': lambda m: put(m, [], 'shards'),
    'an unknown part': lambda m: put(m, dict(prompt_embeds=['t6']), 'conditions'),
    'a text as settings': lambda m: put(m, 'x', 'settings'),
}


@pytest.mark.parametrize('change', BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_manifests_of_strangers(change, cache, tmp_path):
    """Without a checksum, as older caches and hostile ones have none."""
    copy = tmp_path / 'copy'
    shutil.copytree(cache[0], copy)
    manifest = json.loads((copy / 'manifest.json').read_text())
    del manifest['checksum']
    (copy / 'manifest.json').write_text(json.dumps(manifest))
    assert same(read_cache(copy), cache[1])
    change(manifest)
    (copy / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(UsageError):
        read_cache(copy)


@pytest.mark.parametrize('content', [DEEP, '[]', '3', '"x"', 'null', '{}', '{"kind": []}', '\x00'])
def test_manifests_that_are_none(content, cache, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(cache[0], copy)
    (copy / 'manifest.json').write_text(content)
    with pytest.raises(UsageError, match="manifest.json' is damaged"):
        read_cache(copy)


def work_dir(folder, lines, metrics=None):
    data = folder / '20260101_000000' / 'vis_data'
    data.mkdir(parents=True)
    (data / 'scalars.json').write_text('\n'.join(lines))
    (data / 'config.py').write_text('model = dict()')
    if metrics is not None:
        (folder / 'test').mkdir()
        (folder / 'test' / 'metrics.json').write_text(metrics)
    return str(folder)


BAD_LINES = ['[]', '3', DEEP, '{"a": 1}', '{"a": 1, "step": "x"}', '{"step": -3}', '{"step": true}']


@pytest.mark.parametrize('line', BAD_LINES, ids=range(len(BAD_LINES)))
def test_scalars_that_are_none(line, tmp_path):
    with pytest.raises(UsageError, match=r"scalars.json', line 2"):
        read_run(work_dir(tmp_path, ['{"a": 1, "step": 1}', line, '{"a": 1, "step": 3}']))


def test_values_that_are_no_numbers_are_no_curve(tmp_path):
    odd = f'{{"a": 1, "b": true, "c": "x", "d": {10**400}, "e": [1], "step": 1}}'
    assert read_run(work_dir(tmp_path, [odd])).scalars == dict(a={1: 1.0})


@pytest.mark.parametrize(
    'metrics', [DEEP, '[]', '{"fd": 3}', '{"fd": {"g": [1]}}', '{"fd": {"g": {"x": 1}}}']
)
def test_measured_tables_that_are_none(metrics, tmp_path):
    with pytest.raises(UsageError, match=r"metrics.json' (is|holds)"):
        read_run(work_dir(tmp_path, ['{"a": 1, "step": 1}'], metrics))


@pytest.mark.parametrize('name', ['loss $', '$x_{', '$$', r'\$\frac{', '<b>'])
def test_names_are_no_formulas(name):
    svg = curves_svg(name, {name: {1: 1.0, 2: 2.0}, f'{name}2': {1: 1.0}})
    assert svg.startswith('<svg') and name.replace('<', '&lt;').replace('>', '&gt;') in svg


@pytest.fixture(scope='module')
def export(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp('export') / 'out'
    export_generator(read_config(digits.config), digits.weights, str(out))
    return out


@given(how=damages())
@fuzzed(200)
def test_damaged_descriptions_of_exports(export, tmp_path, how):
    """A digit that flips in a coefficient would change every sample."""
    right = read_export(str(export))
    copy = tmp_path / 'copy'
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(export, copy)
    content = (export / EXPORT_FILE).read_bytes()
    (copy / EXPORT_FILE).write_bytes(damage(content, *how))

    def is_right(found):
        return all(found[key] == right[key] for key in right if key != 'description_sha256')

    assert outcome(lambda: read_export(str(copy)), is_right) != 'silently wrong'


PROMPTS = [
    dict(tag='counting', include=[{'class': 'dog', 'count': 2}], prompt='two dogs'),
    dict(tag='color', include=[{'class': 'cat', 'count': 1, 'color': 'red'}], prompt='a red cat'),
]
SCALARS = [dict(loss=1 / step, lr=1e-4, iter=step, step=step) for step in range(1, 30)]
UNSEALED = {
    'results': (read_results, [ROW] * 3),
    'GenEval prompts': (read_metadata, PROMPTS),
    'prompts': (lambda path: read_prompts(path, 'prompt'), PROMPTS),
    'scalars': (lambda path: read_run(str(Path(path).parents[2])), SCALARS),
}


@given(how=damages())
@fuzzed(100)
@pytest.mark.parametrize('name', UNSEALED)
def test_damaged_lines_end_in_a_message(name, tmp_path, how):
    """They hold no checksums, so that a digit may change; nothing else than a message may come."""
    read, rows = UNSEALED[name]
    folder = Path(work_dir_once(tmp_path)) / '20260101_000000' / 'vis_data'
    file = folder / ('scalars.json' if name == 'scalars' else 'rows.jsonl')
    content = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    file.write_bytes(content)
    read(str(file))
    file.write_bytes(damage(content, *how))
    outcome(lambda: read(str(file)), lambda _: True)


def work_dir_once(folder):
    return str(folder) if (folder / '20260101_000000').exists() else work_dir(folder, [])
