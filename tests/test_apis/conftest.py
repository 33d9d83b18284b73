# Copyright (c) mmfgm authors.
"""Trained models without the training: tiny configs, with random weights in checkpoints as
trainings write them."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import DefaultScope

from mmfgm.apis import read_config
from mmfgm.registry import MODELS
from tests.conftest import ROOT
from tests.tiny_sd3 import make_tiny_sd3

DIGITS = f"""
_base_ = [{str(ROOT / 'configs/fgm/digits.py')!r}]
model = dict(network=dict(width=16, depth=2, embed_dim=16), teacher=dict(checkpoint='TEACHER'))
"""
TOY = f"""
_base_ = [{str(ROOT / 'configs/fgm/toy2d_8gaussians.py')!r}]
model = dict(network=dict(width=16, depth=2, embed_dim=16), teacher=dict(checkpoint=None))
"""
SHAPES = f"""
_base_ = [{str(ROOT / 'configs/fgm/shapes.py')!r}]
model = dict(
    network=dict(config=dict(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16)),
    gan=dict(feature_layer=1, head=dict(channels=8)), teacher=dict(checkpoint='TEACHER'))
"""


def randomised(config, seed=0):
    """A built model in which every network has weights of its own, and none are zero."""
    cfg = read_config(str(config))
    torch.manual_seed(seed)
    own = dict(teacher=dict(checkpoint=None))
    if (
        cfg.model.get('guidance') and cfg.model.guidance.null.type == 'CachedNullPrompt'
    ):  # where there is no cache
        own['guidance'] = {**cfg.model.guidance, 'null': dict(type='ZeroPrompt')}
    with DefaultScope.overwrite_default_scope('mmfgm'):
        model = MODELS.build({**cfg.model, **own}).eval()
    for network in model.networks.values():
        for p in network.parameters():
            p.data = p.data + 0.1 * torch.randn_like(p)
    return model


def save_checkpoint(model, path):
    """What a training on one device keeps of the model."""
    state = {
        key: value
        for key, value in model.state_dict().items()
        if key.split('.')[0] not in model.pretrained
    }
    torch.save(dict(state_dict=state), path)
    return str(path)


def make_problem(folder, text):
    """A config, its model, and its checkpoint ``trained.pth``; the teacher's stands for TEACHER in
    the text."""
    config, teacher = folder / 'config.py', folder / 'teacher.pth'
    config.write_text(text.replace("'TEACHER'", repr(str(teacher))))
    model = randomised(config)
    torch.save(
        {f'network_ema.{key}': value for key, value in model.teacher.state_dict().items()}, teacher
    )
    return SimpleNamespace(
        folder=folder,
        config=str(config),
        model=model,
        weights=save_checkpoint(model, folder / 'trained.pth'),
    )


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp('digits'), DIGITS)


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp('toy'), TOY)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp('shapes'), SHAPES)


@pytest.fixture(scope='session')
def sd3_folder(tmp_path_factory):
    return make_tiny_sd3(tmp_path_factory.mktemp('sd3') / 'base')


def sd3_config(folder, **generator):
    """Text of a config of the SD3 recipe on a tiny pipeline, for sampling alone."""
    return f"""
_base_ = [{str(ROOT / 'configs/fgm/sd3_1024.py')!r}]
pretrained = {folder!r}
latent_size = 8
prompt_cache = 'nowhere'
model = dict(
    gan=None,
    generator=dict({', '.join(f'{k}={v}' for k, v in generator.items())}))
"""


@pytest.fixture(scope='session')
def sd3(tmp_path_factory, sd3_folder):
    return make_problem(tmp_path_factory.mktemp('sd3_fgm'), sd3_config(sd3_folder))
