# Copyright (c) mmfgm authors.
"""The ImageNet recipes as a user starts them, on a tiny SiT and a tiny VAE: labelled latents,
training, FID by ADM's file."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from mmfgm.models import SiT
from mmfgm.tools.cache_latents import cache_latents
from tests.conftest import ROOT, train

TINY = dict(latent_size=8, width=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """What the recipes need, in a folder, and the options that put it in its place."""
    folder = tmp_path_factory.mktemp('sit')
    torch.manual_seed(0)
    network = SiT(**TINY)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.save(network.state_dict(), folder / 'SiT.pt')
    AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
    ).save_pretrained(folder / 'vae')
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / f'images/class_{i % 3}').mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'images/class_{i % 3}/{i}.png')
    options = f'--model {folder / "vae"} --vae-only --labels folders --resolution 16'
    cache_latents([str(folder / 'images'), str(folder / 'latents'), *options.split()])
    np.savez(
        folder / 'adm.npz',
        arr_0=rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8),
        mu=np.zeros(48),
        sigma=np.eye(48),
        mu_s=np.zeros(7),
        sigma_s=np.eye(7),
    )
    return folder


def config(folder, name):
    """The recipe with the real network, files and Inception replaced."""
    metric = f"reference={str(folder / 'adm.npz')!r}, feature=dict(type='Pixels', pool=4)"
    small = {name: TINY[name] for name in ('width', 'depth', 'num_heads')}
    cache = '' if name == 'fgm/sit_xl2_256' else f'latent_cache = {str(folder / "latents")!r}'
    path = folder / f'{name.replace("/", "_")}.py'
    path.write_text(f"""
_base_ = [{str(ROOT / f'configs/{name}.py')!r}]
latent_size = 8
num_classes = 3
{cache}
model = dict(
    network=dict(**{small!r}),
    teacher=dict(checkpoint={str(folder / 'SiT.pt')!r}),
    decoder=dict(pretrained={str(folder / 'vae')!r}),
)
train_dataloader = dict(batch_size=2, num_workers=0)
train_cfg = dict(max_iters=2)
evaluations = dict(fid=dict(
    interval=2,
    dataset=dict(num_samples=12),
    metrics=dict(
        _delete_=True,
        fid=dict(type='FID', {metric}),
        prc=dict(type='PrecisionRecall', {metric}),
    ),
))
default_hooks = dict(
    logger=dict(interval=1), samples=dict(interval=2, dataset=dict(num_samples=4))
)
""")
    return path


def values(work_dir):
    lines = [json.loads(line) for line in next(work_dir.glob('*/vis_data/scalars.json')).open()]
    return {name: value for line in lines for name, value in line.items()}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['reflow/sit_xl2_256', 'fgm/sit_xl2_256', 'fgm/sit_xl2_256_gan'])
def test_recipes_run(recipe, name, tmp_path):
    options = ['evaluations.fid.sampling.nfe=2'] if name.startswith('reflow') else []
    train(config(recipe, name), tmp_path / 'work', *options)
    assert {'fid/fid', 'fid/prc_precision', 'fid/prc_recall'} <= set(values(tmp_path / 'work'))
