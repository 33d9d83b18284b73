# Copyright (c) mmfgm authors.
"""tools/assets/add.py keeps assets small and writes down what they are."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file

from mmfgm.errors import UsageError
from mmfgm.files import sha256
from tests.conftest import ROOT

WORDS = ['--command', 'python make.py', '--about', 'a toy']


@pytest.fixture
def tool(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location('add', ROOT / 'tools/assets/add.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'ASSETS', tmp_path / 'assets')
    return module


def test_writes_the_file_and_its_origin(tool, tmp_path):
    file = tmp_path / 'x.safetensors'
    save_file(dict(x=torch.arange(3)), file)
    tool.add([str(file), 'a/x.safetensors', *WORDS])
    assert (tmp_path / 'assets/a/x.safetensors').read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / 'assets/assets.json').read_text()) == {
        'a/x.safetensors': dict(sha256=sha256(str(file)), command='python make.py', about='a toy')
    }


def test_refuses_large_and_other_files(tool, tmp_path, monkeypatch):
    file = tmp_path / 'x.safetensors'
    save_file(dict(x=torch.zeros(1000)), file)
    tool.add([str(file), 'x.safetensors', *WORDS])
    monkeypatch.setattr(tool, 'MAX_ALL', 8000)
    # in its own place it does not count twice
    tool.add([str(file), 'x.safetensors', *WORDS])
    with pytest.raises(UsageError, match='keep to 8 MB a file'):
        tool.add([str(file), 'y.safetensors', *WORDS])
    monkeypatch.setattr(tool, 'MAX_FILE', 3000)
    with pytest.raises(UsageError, match='keep to 0 MB a file'):
        tool.add([str(file), 'x.safetensors', *WORDS])
    for name in (str(tmp_path / 'none.safetensors'), __file__):
        with pytest.raises(UsageError, match='write one with tools/merge_checkpoint.py'):
            tool.add([name, 'z.safetensors', *WORDS])


def test_the_index_is_that_of_the_folder():
    """No file without an entry, none missing, each as its checksum says, none too large."""
    index = json.loads((ROOT / 'assets/assets.json').read_text())
    files = {str(p.relative_to(ROOT / 'assets')): p for p in ROOT.glob('assets/**/*.safetensors')}
    assert set(index) == set(files)
    for name, file in files.items():
        assert sha256(str(file)) == index[name]['sha256'] and file.stat().st_size <= 8e6
        assert index[name]['command'].startswith('python ') and index[name]['about']
    assert sum(file.stat().st_size for file in files.values()) <= 20e6
