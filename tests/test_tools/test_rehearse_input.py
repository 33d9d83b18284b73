# Copyright (c) mmfgm authors.
"""What a rehearsal is given: architectures that come along, and input that is wrong."""

import json

import pytest
import torch

from mmfgm.apis import read_config
from mmfgm.apis.rehearsal import COLUMNS, dummy_batch, known_architectures, without_weights
from mmfgm.errors import UsageError
from mmfgm.models.networks import AdaLNMLP
from mmfgm.registry import MODELS
from mmfgm.tools.rehearse import rehearse_tool
from tests.conftest import ROOT, run_module

DIGITS = ROOT / 'configs/fgm/digits.py'
TINY = dict(
    sample_size=8,
    in_channels=16,
    num_layers=1,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=64,
    pos_embed_max_size=8,
)
# parameters of the published files of each model
PUBLISHED = {
    'Alpha-VLLM/Lumina-Image-2.0': 2_609_769_152,
    'Qwen/Qwen-Image': 20_430_401_088,
    'Tongyi-MAI/Z-Image': 6_154_908_736,
    'black-forest-labs/FLUX.1-dev': 11_901_408_320,
    'black-forest-labs/FLUX.2-klein-base-4B': 3_875_544_576,
}
# of these, only what their authors say in words
ROUND = {
    'Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers': '1.6',
    'black-forest-labs/FLUX.2-dev': '32',
    'stabilityai/stable-diffusion-3-medium-diffusers': '2.0',
    'stabilityai/stable-diffusion-3.5-large': '8.1',
    'stabilityai/stable-diffusion-3.5-medium': '2.2',
}


def test_architectures_have_the_parameters_of_the_published_models():
    import diffusers

    files = known_architectures()
    assert files.keys() == PUBLISHED.keys() | ROUND.keys()
    for name, file in files.items():
        facts = json.load(open(file))
        with torch.device('meta'):
            network = getattr(diffusers, facts['_class_name'])(
                **{key: value for key, value in facts.items() if key[0] != '_'}
            )
        number = sum(p.numel() for p in network.parameters())
        if name in PUBLISHED:
            assert number == PUBLISHED[name]
        else:
            decimals = len(ROUND[name].partition('.')[2])
            assert f'{number / 1e9:.{decimals}f}' == ROUND[name]


def test_every_recipe_names_a_known_architecture():
    names = {
        read_config(str(path)).get('pretrained')
        for folder in ('fgm', 'reflow')
        for path in (ROOT / 'configs' / folder).glob('*.py')
    }
    assert names - {None} and names - {None} <= known_architectures().keys()


def test_of_a_local_folder_only_the_architecture_is_read(tmp_path):
    from diffusers import SD3Transformer2DModel

    with torch.device('meta'):
        SD3Transformer2DModel(**TINY).save_config(tmp_path / 'transformer')
    network = without_weights(dict(type='SD3', latent_size=8, pretrained=str(tmp_path)))
    assert network['config'].items() >= TINY.items() and 'pretrained' not in network


def test_nothing_is_left_behind(tmp_path):
    path = tmp_path / 'run.py'
    path.write_text(f'_base_ = [{str(DIGITS)!r}]\nmodel = dict(network=dict(width=16, depth=1))')
    found = run_module('mmfgm.tools.rehearse', path, '--gpus', 8, '--markdown', cwd=tmp_path)
    assert found.stdout.startswith(f'| `{path}` | DDP, fp32 | 8 x 256 x 1 | ')
    assert found.stdout.count('|') == len(COLUMNS) + 1
    assert [each.name for each in tmp_path.iterdir()] == ['run.py']


@MODELS.register_module()
class LooksAtValues(AdaLNMLP):
    """It cannot be built without values."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        next(self.parameters()).sum().item()


@pytest.mark.parametrize(
    'options, message',
    [
        (['--gpu', 'H900'], "expected --gpu to be one of .*, found 'H900'"),
        (['--gpus', '0'], 'expected --gpus to be at least 1, found 0'),
        (['--per-machine', '0'], 'expected --per-machine to be at least 1, found 0'),
        (
            [
                '--gpus',
                '2',
                '--cfg-options',
                'strategy.type=FSDP2Strategy',
                'strategy.block_types=B,',
            ],
            'matches no layer of network',
        ),
        (['--cfg-options', 'strategy.precision=fp8'], 'precision must be one of'),
        (['--cfg-options', 'train_cfg.share_velocity=True'], 'one density of t'),
        (['--cfg-options', 'model.network.type=LooksAtValues'], 'cannot be built on the meta'),
        (
            ['--cfg-options', 'model.network.pretrained=somewhere'],
            r'shapes are known without its weights, found AdaLNMLP with pretrained=.somewhere',
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        rehearse_tool([str(DIGITS), *options])


def test_bad_configs_and_networks():
    with pytest.raises(UsageError, match='the config has no .*train_dataloader'):
        rehearse_tool([str(ROOT / 'configs/geneval/sd3.py')])
    with pytest.raises(UsageError, match='dummy_conditions'):
        dummy_batch(torch.nn.Linear(1, 1), 2)
