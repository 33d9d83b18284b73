# Copyright (c) mmfgm authors.
"""What docs/security.md claims and no other test shows; and that the tests it names exist."""

import ast
import os
import re

import pytest
import torch

from mmfgm.apis.config import read_config
from mmfgm.apis.quickstart import fresh_unless_same
from mmfgm.errors import UsageError
from tests.conftest import ROOT
from tests.damage import snapshot

PAGE = (ROOT / 'docs' / 'security.md').read_text()


def test_every_claim_names_a_test_that_exists():
    named = set(re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', PAGE))
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file
    rows = [line for line in PAGE.splitlines() if line.startswith('| ') and ' --- ' not in line]
    without = [row for row in rows if '::' not in row and not row.rstrip(' |').endswith('test')]
    assert [row.split('|')[1].strip() for row in without] == [
        'a pipeline of diffusers, a tokenizer'
    ]


def test_a_config_is_a_program(tmp_path):
    (tmp_path / 'config.py').write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nmodel = {{}}"
    )
    read_config(str(tmp_path / 'config.py'))
    assert (tmp_path / 'ran').exists()


class Attack:
    def __reduce__(self):
        return os.system, ('touch attacked',)


def detector(path):
    from mmfgm.evaluation.geneval.detectors.mmdet_detector import MMDetMask2Former

    MMDetMask2Former._load(torch.nn.Linear(2, 2), path, weights_only=True)


def clip(path):
    pytest.importorskip('open_clip')
    from mmfgm.evaluation.geneval.colors import ClipColors

    ClipColors(model='ViT-B-32', pretrained=path)


def inception(path):
    pytest.importorskip('torch_fidelity')
    from mmfgm.evaluation.features import InceptionV3

    InceptionV3(weights=path, sha256=None)


@pytest.mark.parametrize('load', [detector, clip, inception])
def test_weights_of_metrics_are_read_as_checkpoints(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=dict(weight=torch.zeros(2)), extra=Attack()), 'weights.pth')
    with pytest.raises(UsageError, match='could run code'):
        load('weights.pth')
    assert not os.path.exists('attacked')


@pytest.mark.parametrize('kind', ['folder', 'file', 'link'])
def test_the_quickstart_deletes_nothing_of_others(kind, tmp_path):
    """A project's own test/ lies where ``--work-dir .`` would put its measurements."""
    folder = tmp_path / 'test'
    if kind == 'file':
        folder.write_text('notes')
    else:
        (tmp_path / 'mine').mkdir()
        (tmp_path / 'mine' / 'test_a.py').write_text('a year of work')
        folder.symlink_to(tmp_path / 'mine') if kind == 'link' else (tmp_path / 'mine').rename(
            folder
        )
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match='does not delete it'):
        fresh_unless_same(str(folder), dict(a=1))
    assert snapshot(tmp_path) == before


def test_the_quickstart_empties_its_own_folder(tmp_path):
    folder = str(tmp_path / 'test')
    assert not fresh_unless_same(folder, dict(a=1))
    (tmp_path / 'test' / 'picture.png').write_text('x')
    assert fresh_unless_same(folder, dict(a=1)) and (tmp_path / 'test' / 'picture.png').exists()
    assert not fresh_unless_same(folder, dict(a=2))
    assert os.listdir(folder) == ['request.json']
    (tmp_path / 'test' / 'request.json').write_text('[' * 100_000)
    assert not fresh_unless_same(folder, dict(a=2))
