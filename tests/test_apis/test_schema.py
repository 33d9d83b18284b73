# Copyright (c) mmfgm authors.
"""An export from a stranger is data: whatever its JSON says, nothing that it names is run."""

import copy
import json
import resource
import shutil

import pytest
from mmengine.registry import DefaultScope

from mmfgm.apis import FGMInferencer, OneStepPipeline, allow_in_exports, export_generator, sizes
from mmfgm.apis.artifacts import EXPORT_FILE, read_export
from mmfgm.apis.config import read_config
from mmfgm.apis.schema import NETWORKS
from mmfgm.errors import UsageError
from mmfgm.models import AdaLNMLP
from mmfgm.registry import MODELS


@pytest.fixture(scope='module')
def export(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('export') / 'out'
    export_generator(read_config(digits.config), digits.weights, str(folder))
    return folder


def tampered(export, tmp_path, path, value):
    """A copy of the export in which one entry of its description is another."""
    folder = tmp_path / 'export'
    shutil.copytree(export, folder)
    description = json.loads((folder / EXPORT_FILE).read_text())
    # whoever changes it can change its checksum too
    del description['description_sha256']
    *parents, last = path.split('.')
    entry = description
    for name in parents:
        entry = entry.setdefault(name, {})
    entry[last] = value
    (folder / EXPORT_FILE).write_text(json.dumps(description))
    return str(folder)


def shell(marker):
    return dict(type='os.system', command=f'touch {marker}')


def pickled(marker):
    return dict(type='torch.load', f=str(marker), weights_only=False)


MLP = dict(type='AdaLNMLP', event_shape=[1, 8, 8], num_classes=10)
EDM = dict(type='EDMVelocity')


@pytest.mark.parametrize('attack', [shell, pickled], ids=['a shell', 'a pickle'])
@pytest.mark.parametrize(
    'path', ['model.network', 'model.generator', 'model.decoder', 'text_encoder', 'model.null']
)
@pytest.mark.parametrize('load', [FGMInferencer, OneStepPipeline.from_pretrained])
def test_dotted_names_are_not_built(export, tmp_path, path, attack, load):
    marker = tmp_path / 'ran'
    folder = tampered(export, tmp_path, path, attack(marker))
    with pytest.raises(UsageError, match=r'expected .* to be .*, found .*; export again'):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    'path, value, message',
    [
        ('model.network', {**EDM, 'unet': shell('ran')}, r"model.network.unet.type .*'os.system'"),
        ('model.network', {**MLP, 'width': dict(type='os.system')}, r"found .the key 'type'"),
        ('model.network', {**MLP, 'weights_only': False}, "the key 'weights_only'"),
        ('model.network', {**MLP, '_scope_': 'mmengine'}, "the key '_scope_'"),
        ('model.network', {**MLP, 'init_cfg': dict(checkpoint='x.pth')}, "the key 'init_cfg'"),
        ('model.network', dict(type='SD3', latent_size=8, dtype='load'), 'network.dtype'),
        # registered, but nothing that an export holds
        ('model.network', dict(type='FGM'), "model.network.type .*, found 'FGM'"),
        ('model.network', dict(type='mmengine.Sequential'), "found 'mmengine.Sequential'"),
        ('model.decoder', dict(type='InceptionV3', weights='x', sha256=None), "'InceptionV3'"),
        ('text_encoder', dict(type='CachedNullPrompt', path='x'), "'CachedNullPrompt'"),
        ('text_encoder', dict(family='sd4', pretrained='x'), "text_encoder.family .*'sd4'"),
        ('model.teacher', dict(checkpoint='x.pth'), "found 'teacher'"),
        ('model.type', 'os.system', "model.type .*'os.system'"),
        ('model.network', 'os.system', 'an object with names'),
        ('model', ['os.system'], 'an object with names'),
        ('network', 'os.system', "the name of a network, found 'os.system'"),
        ('kind', 'shell', "found 'shell'"),
    ],
)
def test_only_what_an_export_says_is_read(export, tmp_path, path, value, message):
    with pytest.raises(UsageError, match=message):
        read_export(tampered(export, tmp_path, path, value))


def test_deep_nesting_is_refused(export, tmp_path):
    value = []
    for _ in range(500):
        value = [value]
    with pytest.raises(UsageError, match='levels'):
        read_export(tampered(export, tmp_path, 'model.network.width', value))


@pytest.mark.parametrize(
    'path, value, message',
    [
        ('model.network.width', 10**9, 'a network of'),
        ('model.network.width', 2**62, 'a network that can be built'),
        ('model.network.width', 'wide', 'a network that can be built'),
        ('model.network.depth', 10**9, 'depth to be at most'),
        ('model.network.num_classes', 10**12, 'a network of'),
        ('model.network.event_shape', [1, 10**6, 10**6], 'a network of'),
        ('model.generator', dict(type='FewStepGenerator', times=10**12), 'expected 1 to 1000'),
        ('model.generator', dict(type='DataSpaceGenerator', steps=10**12), 'expected 1 to 1000'),
        ('model.generator', dict(type='DataSpaceGenerator', steps=1000), 'a network of'),
    ],
)
def test_absurd_sizes_take_no_memory(export, tmp_path, path, value, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=message):
        FGMInferencer(tampered(export, tmp_path, path, value))
    # kilobytes; the smallest of these networks would take gigabytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19


def test_samples_that_no_memory_holds_are_refused(export, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, 'LARGEST_EVENT', 63)  # digits have 64 numbers
    with pytest.raises(UsageError, match='samples of at most'):
        FGMInferencer(str(export))


def test_an_export_of_ours_is_read(export):
    with DefaultScope.overwrite_default_scope('mmfgm'):
        assert read_export(str(export))['model']['network']['type'] == 'AdaLNMLP'


def test_a_class_of_ones_own_is_allowed_by_the_program_that_loads(export, tmp_path, monkeypatch):
    monkeypatch.setattr('mmfgm.apis.schema.PLACES', dict(network=copy.deepcopy(NETWORKS)))
    kinds = {}
    monkeypatch.setattr('mmfgm.apis.schema.NETWORKS', kinds)
    MODELS.register_module(name='MyMLP', module=AdaLNMLP, force=True)
    folder = tampered(export, tmp_path, 'model.network.type', 'MyMLP')
    with pytest.raises(UsageError, match="found 'MyMLP'.*allow_in_exports"):
        read_export(folder)
    monkeypatch.setattr('mmfgm.apis.schema.PLACES', dict(network=kinds))
    allow_in_exports('network', 'MyMLP')
    assert read_export(folder)['model']['network']['type'] == 'MyMLP'
    for place, kind in (('teacher', 'MyMLP'), ('network', 'os.system')):
        with pytest.raises(UsageError, match='expected a place'):
            allow_in_exports(place, kind)
