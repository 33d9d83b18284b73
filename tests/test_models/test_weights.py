# Copyright (c) mmfgm authors.
import copy
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from mmfgm.errors import UsageError
from mmfgm.models import AdaLNMLP, EDMVelocity, fingerprint, load_network

SETTINGS = dict(event_shape=(2,), width=8, depth=1, embed_dim=8)


@pytest.fixture
def source():
    torch.manual_seed(0)
    network = AdaLNMLP(**SETTINGS)
    for p in network.parameters():
        torch.nn.init.normal_(p)
    return network


def write(kind, source, tmp_path):
    prefixed = {f'network_ema.{key}': value for key, value in source.state_dict().items()}
    if kind == 'safetensors':
        save_file(source.state_dict(), tmp_path / 'w.safetensors')
        return tmp_path / 'w.safetensors', ''
    if kind == 'pth':
        torch.save(dict(state_dict=prefixed, meta=dict(iter=1)), tmp_path / 'iter_1.pth')
        return tmp_path / 'iter_1.pth', 'network_ema'
    torch.save(dict(state_dict=prefixed), tmp_path / 'iter_2.pth')
    (tmp_path / 'last_checkpoint').write_text('/somewhere/else/iter_2.pth')  # the folder was moved
    return tmp_path, 'network_ema'


@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'work_dir'])
def test_loads(kind, source, tmp_path):
    path, prefix = write(kind, source, tmp_path)
    network = load_network(AdaLNMLP(**SETTINGS), str(path), prefix)
    assert all(
        torch.equal(value, source.state_dict()[key]) for key, value in network.state_dict().items()
    )


def test_loads_into_a_part(tmp_path):
    """As an EDM network's weights go into the velocity network around it."""
    torch.manual_seed(0)
    unet = dict(
        type='EDMUNet',
        img_resolution=8,
        in_channels=1,
        out_channels=1,
        model_channels=8,
        channel_mult=(1,),
        num_blocks=1,
    )
    source, target = EDMVelocity(unet).unet, EDMVelocity(unet)
    save_file(
        {key: value.contiguous() for key, value in source.state_dict().items()},
        tmp_path / 'edm.safetensors',
    )
    load_network(target, str(tmp_path / 'edm.safetensors'), into='unet')
    assert all(
        torch.equal(value, source.state_dict()[key])
        for key, value in target.unet.state_dict().items()
    )
    with pytest.raises(UsageError, match="has no part 'network'; its parts are .*'unet'"):
        load_network(target, str(tmp_path / 'edm.safetensors'), into='network')


def test_names_the_first_mismatch(source, tmp_path):
    path, prefix = write('pth', source, tmp_path)
    with pytest.raises(
        UsageError,
        match=r"'input.weight' has shape \(8, 2\) there, but the config builds \(16, 2\)",
    ):
        load_network(AdaLNMLP(**{**SETTINGS, 'width': 16}), str(path), prefix)
    with pytest.raises(UsageError, match="'blocks.1.mlp.0.weight' of shape .* is missing"):
        load_network(AdaLNMLP(**{**SETTINGS, 'depth': 2}), str(path), prefix)
    with pytest.raises(UsageError, match="no network 'teacher'; it holds \\['network_ema'\\]"):
        load_network(AdaLNMLP(**SETTINGS), str(path), 'teacher')


def test_extra_tensor(source, tmp_path):
    save_file({**source.state_dict(), 'surplus': torch.zeros(1)}, tmp_path / 'w.safetensors')
    with pytest.raises(UsageError, match="'surplus' has no place"):
        load_network(AdaLNMLP(**SETTINGS), str(tmp_path / 'w.safetensors'))


class Attack:
    def __reduce__(self):
        return os.system, ('touch attacked',)


def test_a_pickle_with_code_is_refused_unless_asked_for(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=source.state_dict(), extra=Attack()), 'w.pth')
    with pytest.raises(UsageError, match='could run code.*weights_only=False'):
        load_network(AdaLNMLP(**SETTINGS), 'w.pth')
    assert not os.path.exists('attacked')
    load_network(AdaLNMLP(**SETTINGS), 'w.pth', weights_only=False)
    assert os.path.exists('attacked')


# pickles that would run `touch attacked`: by the plain road, and through a name inside an allowed
# module
DIRECT = pickle.dumps(Attack())
DOTTED = (
    b'\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x0etouch'
    b' attacked\x85R.'
)


@pytest.mark.parametrize('content', [DIRECT, DOTTED])
def test_a_sharded_index_with_code_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'iter_1.pth').mkdir()
    (tmp_path / 'iter_1.pth' / '.metadata').write_bytes(content)
    with pytest.raises(UsageError, match='has no place in a checkpoint'):
        load_network(AdaLNMLP(**SETTINGS), 'iter_1.pth')
    assert not os.path.exists('attacked')


def test_a_sharded_checkpoint_loads(source, tmp_path):
    state = {f'network_ema.{key}': value for key, value in source.state_dict().items()}
    dcp.save(dict(state_dict=state), checkpoint_id=str(tmp_path / 'iter_1.pth'), no_dist=True)
    network = load_network(AdaLNMLP(**SETTINGS), str(tmp_path / 'iter_1.pth'), 'network_ema')
    assert all(
        torch.equal(value, source.state_dict()[key]) for key, value in network.state_dict().items()
    )


def test_a_work_dir_without_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match='holds no checkpoint'):
        load_network(AdaLNMLP(**SETTINGS), str(tmp_path))


def test_fingerprint_sees_every_weight(source):
    before = fingerprint(source)
    assert fingerprint(copy.deepcopy(source)) == before
    with torch.no_grad():
        source.output.bias[-1] += 1e-6
    assert fingerprint(source) != before


@pytest.mark.parametrize(
    'name, content',
    [
        ('w.pth', b'not a checkpoint'),
        ('w.pth', b''),
        ('w.safetensors', b'nothing'),
        ('w.pth', pickle.dumps([1])[:5]),
    ],
)
def test_broken_files(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError):
        load_network(AdaLNMLP(**SETTINGS), str(tmp_path / name))


def test_missing_file():
    with pytest.raises(UsageError, match='does not exist'):
        load_network(AdaLNMLP(**SETTINGS), 'nowhere.pth')
