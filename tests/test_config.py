# Copyright (c) mmfgm authors.
"""One truth, one key: a value of a config is written once and reaches every place that needs it."""

import pytest
from mmengine.config import Config

from mmfgm.apis import read_config
from mmfgm.config import REFERENCE, SHARED_KEYS, resolve
from mmfgm.engine import FlowRunner
from mmfgm.errors import UsageError
from tests.conftest import ROOT

SD3, CIFAR = (
    str(ROOT / f'configs/fgm/{name}.py') for name in ('sd3_512_lora_1xb4', 'cifar10_cond')
)
LATENTS = 'train_dataloader.dataset.real'
SAMPLES, FID = 'default_hooks.samples.dataset', 'evaluations.fid.dataset'
CONSUMERS = [
    (SD3, 'pretrained', 'folder', ['model.network.pretrained', 'model.decoder.pretrained']),
    (SD3, 'latent_size', 8, ['model.network.latent_size']),
    (
        SD3,
        'prompt_cache',
        'cache',
        [
            'model.guidance.null.path',
            'train_dataloader.dataset.conditions.path',
            f'{SAMPLES}.path',
        ],
    ),
    (SD3, 'latent_cache', 'cache', [f'{LATENTS}.path']),
    (
        CIFAR,
        'num_classes',
        3,
        [
            'model.network.unet.label_dim',
            'train_dataloader.dataset.num_classes',
            f'{SAMPLES}.num_classes',
            f'{FID}.num_classes',
        ],
    ),
    (
        str(ROOT / 'configs/reflow/cifar10_uncond.py'),
        'num_classes',
        3,
        [
            'model.network.unet.label_dim',
            'train_dataloader.dataset.labels',
            f'{SAMPLES}.num_classes',
            f'{FID}.num_classes',
        ],
    ),
    (
        str(ROOT / 'configs/fgm/digits.py'),
        'num_classes',
        3,
        [
            'model.network.num_classes',
            'train_dataloader.dataset.num_classes',
            f'{SAMPLES}.num_classes',
            'evaluations.fd.dataset.num_classes',
        ],
    ),
]


def at(cfg, place):
    for key in place.split('.'):
        cfg = cfg[key]
    return cfg


@pytest.mark.parametrize('name, key, value, places', CONSUMERS)
def test_one_key_reaches_every_place(name, key, value, places, tmp_path):
    (tmp_path / 'mine.py').write_text(f'_base_ = {name!r}\n{key} = {value!r}\n')
    (tmp_path / 'again.py').write_text("_base_ = 'mine.py'\n")
    for cfg in (
        read_config(name, {key: value}),
        read_config(str(tmp_path / 'mine.py')),
        read_config(str(tmp_path / 'again.py')),
    ):
        assert [at(cfg, place) for place in places] == [value] * len(places)
        if key == 'latent_size':
            assert tuple(at(cfg, f'{LATENTS}.latent_shape')) == (16, value, value)


def test_our_configs_leave_nothing_unresolved():
    for path in ROOT.glob('configs/[!_]*/*.py'):
        written = Config.fromfile(str(path))
        # a key that nothing refers to would be another truth
        used = set(REFERENCE.findall(repr(written)))
        assert used == {key for key in SHARED_KEYS if key in written}, path
        assert not REFERENCE.search(repr(resolve(written))), path


def test_a_dumped_config_says_the_same(tmp_path):
    cfg = read_config(SD3, dict(latent_size=8))
    cfg.dump(str(tmp_path / 'dump.py'))
    assert read_config(str(tmp_path / 'dump.py'))._cfg_dict == cfg._cfg_dict


def test_the_runner_resolves_a_config_of_a_user(tmp_path):
    cfg = Config.fromfile(str(ROOT / 'configs/fgm/digits.py'))
    cfg._cfg_dict.pop('num_classes')
    cfg.work_dir = str(tmp_path)
    with pytest.raises(UsageError, match=r'model\.network\.num_classes.*set num_classes'):
        FlowRunner.from_cfg(cfg)


def test_a_place_of_its_own_still_wins():
    options = {'latent_size': 8, 'model.network.latent_size': 16}
    cfg = read_config(SD3, options)
    assert cfg.model.network.latent_size == 16
    assert tuple(at(cfg, f'{LATENTS}.latent_shape')) == (16, 8, 8)


def test_references_that_lead_nowhere():
    for cfg, message in (
        (dict(a=dict(b=[1, '${size}'])), r"a\.b\.1='\${size}': expected a top-level key size"),
        (dict(a='x/${size}', size=1), r"a: expected '\${size}' alone, found 'x/\${size}'"),
        (dict(a='${b}', b='${a}'), 'a: expected a value|b: expected a value'),
    ):
        with pytest.raises(UsageError, match=message):
            resolve(Config(cfg))
    assert resolve(Config(dict(a=('${b}', 2), b=None))).a == (None, 2)
    # each place has its own copy
    cfg = resolve(Config(dict(a=dict(x='${c}', y='${c}'), c=dict(z=1))))
    cfg.a.x.z = 2
    assert cfg.a.y.z == cfg.c.z == 1


def test_a_key_that_nothing_refers_to(tmp_path):
    """Such as one of a dumped config, whose values are plain: not ignored in silence."""
    read_config(CIFAR).dump(str(tmp_path / 'config.py'))
    with pytest.raises(UsageError, match=rf'--cfg-options num_classes=.*{FID}\.num_classes'):
        read_config(str(tmp_path / 'config.py'), dict(num_classes=3))
