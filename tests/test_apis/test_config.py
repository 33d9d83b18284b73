# Copyright (c) mmfgm authors.
"""A run's dumped config is read as data, even where it comes from a stranger."""

import pytest
from mmengine.config import Config

from mmfgm.apis.config import read_dump
from mmfgm.errors import UsageError
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / 'configs').glob('[fr]*/*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_what_is_dumped_is_read_back(path, tmp_path):
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'config.py')
    assert read_dump(str(tmp_path / 'config.py')).to_dict() == cfg.to_dict()


def test_unusual_values(tmp_path):
    cfg = Config(dict(a=dict(b=(1, -2.5, None), c=[True, 'x\n']), d={'two words': {3: 1e-300}}))
    cfg.dump(tmp_path / 'config.py')
    assert read_dump(str(tmp_path / 'config.py')).to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    'text',
    [
        'import os\nos.system("touch MARKER")',
        'model = __import__("os").system("touch MARKER")',
        'model = dict(a=open("MARKER", "w"))',
        'model = [0 for _ in [open("MARKER", "w")]]',
        'model = dict(**open("MARKER", "w"))',
        'model = {**{open("MARKER", "w"): 1}}',
        'model = dict([("a", open("MARKER", "w"))])',
        'model = (lambda: open("MARKER", "w"))()',
        "model = f\"{open('MARKER', 'w')}\"",
        '_base_ = "other.py"\nmodel.a = 1',
        'model: dict = open("MARKER", "w")',
        'model = dict(',
        'model = ' + '(' * 5000 + ')' * 5000,
        'model = dict(a=1' + ' + 1' * 100000 + ')',
        'model = "\x00"',
    ],
)
def test_nothing_in_it_is_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(UsageError, match='expected .* to be the config that a run wrote'):
        read_dump(str(tmp_path / 'config.py'))
    assert not (tmp_path / 'MARKER').exists()


def test_a_base_is_a_name_like_any_other(tmp_path):
    (tmp_path / 'other.py').write_text('import os\nos.system("touch MARKER")')
    (tmp_path / 'config.py').write_text('_base_ = "other.py"\nmodel = dict(type="FGM")')
    assert read_dump(str(tmp_path / 'config.py'))['model']['type'] == 'FGM'


def test_missing_or_not_text(tmp_path):
    (tmp_path / 'config.py').write_bytes(b'\xff\xfe')
    for name in ('config.py', 'nowhere.py'):
        with pytest.raises(UsageError, match='name the work dir of a run'):
            read_dump(str(tmp_path / name))
