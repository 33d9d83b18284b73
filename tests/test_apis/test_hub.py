# Copyright (c) mmfgm authors.
"""Exports to the hub and back, against the signatures of its own client."""

import os
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError

from mmfgm.apis import OneStepPipeline
from mmfgm.apis.export import HubRepository
from mmfgm.errors import UsageError
from mmfgm.tools.export_diffusers import export_diffusers


@pytest.fixture
def api(monkeypatch):
    """The hub's client, which refuses arguments that the real one does not know."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: api)
    return api


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def test_an_export_is_put_on_the_hub(digits, api, tmp_path):
    out = tmp_path / 'out'
    export_diffusers(
        [digits.config, digits.weights, str(out), '--push-to-hub', 'me/digits', '--private']
    )
    api.create_repo.assert_called_once_with('me/digits', private=True, exist_ok=True)
    (repo, operations), _ = api.create_commit.call_args
    assert repo == 'me/digits'
    pushed = {operation.path_in_repo: operation for operation in operations}
    assert sorted(pushed) == files(out) and len(pushed) >= 3
    for name, operation in pushed.items():
        with operation.as_file() as f:
            content = f.read()
        own = (out / name).read_bytes()
        assert content == own if name != 'README.md' else content != own
    card = pushed['README.md'].path_or_fileobj.decode()
    assert "OneStepPipeline.from_pretrained('me/digits')" in card and 'THIS FOLDER' not in card


def test_folders_in_an_export_keep_their_places(api, tmp_path):
    (tmp_path / 'transformer').mkdir()
    (tmp_path / 'transformer' / 'config.json').write_text('{}')
    (tmp_path / 'README.md').write_text("from_pretrained('THIS FOLDER')")
    HubRepository('me/sd3').push(str(tmp_path))
    _, operations = api.create_commit.call_args.args
    assert [operation.path_in_repo for operation in operations] == [
        'README.md',
        'transformer/config.json',
    ]


@pytest.mark.parametrize('name', ['digits', 'me/digits/2', 'me/di gits', '-me/digits'])
def test_a_name_that_is_none(name, api):
    with pytest.raises(UsageError, match='expected a repository OWNER/NAME'):
        HubRepository(name)
    api.create_repo.assert_not_called()


def test_who_may_not_write_hears_so_before_anything_is_read(digits, api, tmp_path):
    api.whoami.side_effect = LocalTokenNotFoundError('no token')
    with pytest.raises(UsageError, match='no token\nLog in.*hf auth login'):
        export_diffusers(
            [digits.config, 'gone.pth', str(tmp_path / 'out'), '--push-to-hub', 'me/digits']
        )
    assert not list(tmp_path.iterdir())


def test_an_export_outlives_a_hub_that_does_not_take_it(digits, api, tmp_path):
    out = tmp_path / 'out'
    api.create_commit.side_effect = OSError('connection lost')
    with pytest.raises(UsageError, match='is whole.*connection lost\nUpload it later: hf upload'):
        export_diffusers([digits.config, digits.weights, str(out), '--push-to-hub', 'me/digits'])
    assert OneStepPipeline.from_pretrained(str(out))


def test_private_without_the_hub(digits, tmp_path):
    with pytest.raises(UsageError, match='--private is of the repository of --push-to-hub'):
        export_diffusers([digits.config, digits.weights, str(tmp_path / 'out'), '--private'])


def test_an_export_is_opened_by_its_id(digits, monkeypatch, tmp_path):
    """As the hub's cache keeps it: links to the files."""
    out, cache = tmp_path / 'out', tmp_path / 'snapshot'
    export_diffusers([digits.config, digits.weights, str(out)])
    cache.mkdir()
    for name in files(out):
        os.symlink(out / name, cache / name)
    download = create_autospec(huggingface_hub.snapshot_download, return_value=str(cache))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    pipe = OneStepPipeline.from_pretrained('me/digits', device='cpu')
    download.assert_called_once_with('me/digits')
    here = OneStepPipeline.from_pretrained(str(out), device='cpu')
    images = [p(labels=[3, 1], seeds=0, output_type='tensor').images for p in (pipe, here)]
    assert torch.equal(*(torch.stack(list(i)) for i in images))


def test_an_id_that_the_hub_does_not_have(monkeypatch):
    def gone(repo):
        raise OSError('404 Client Error')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', gone)
    with pytest.raises(UsageError, match="'me/gone' cannot be had from the hub .*404"):
        OneStepPipeline.from_pretrained('me/gone')
