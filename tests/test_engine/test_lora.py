# Copyright (c) mmfgm authors.
"""A LoRA run on a tiny MM-DiT: adapters alone are trained, saved and resumed, on one process or
two."""

import pytest
import torch

from mmfgm.models import read_state_dict
from tests.conftest import ROOT, train

TOLERANCE = dict(rtol=1e-4, atol=5e-6)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('lora') / 'fgm.py'
    path.write_text(f"""
_base_ = [{str(ROOT / 'configs/fgm/shapes.py')!r}]
model = dict(
    type='RowNoiseFGM', teacher=dict(checkpoint=None), gan=dict(head=dict(channels=8)),
    network=dict(config=dict(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16),
        checkpointing=True),
    lora=dict(
        rank=4, alpha=8,
        target_modules=('attn.to_q', 'attn.to_v', 'ff.net.0.proj', 'proj_out')))
train_dataloader = dict(batch_size=8, num_workers=0)
train_cfg = dict(max_iters=4)
# float32 noise in a tiny gradient must not become a full step
optim_wrapper = dict(
    online=dict(optimizer=dict(eps=3e-6, lr=1e-2)),
    generator=dict(optimizer=dict(eps=3e-6, lr=1e-2)),
    discriminator=dict(optimizer=dict(eps=1e-3, lr=1e-2)))
evaluations = dict(shapes=dict(interval=0, dataset=dict(num_samples=13), batch_size=5,
                               metrics=dict(score=dict(prompts=dict(num_samples=13)))))
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=2), samples=dict(interval=1000)
)
custom_imports = dict(imports=['tests.helpers'])
""")
    return path


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(config, tmp_path):
    train(config, tmp_path / 'one')
    train(config, tmp_path / 'two', 'train_dataloader.batch_size=4', nproc=2)
    train(
        config,
        tmp_path / 'parts',
        'default_hooks.kill.type=KillHook',
        'default_hooks.kill.at=3',
        'default_hooks.kill.when=before',
        codes=None,
    )
    assert (tmp_path / 'parts' / 'last_checkpoint').read_text().endswith('iter_2.pth')
    train(config, tmp_path / 'parts', resume=True)
    one, two, parts, start = (
        read_state_dict(str(tmp_path / name)) for name in ('one', 'two', 'parts', 'one/iter_2.pth')
    )
    # nothing of the shared base is saved
    assert {key.split('.')[0] for key in one} == {
        'online',
        'discriminator',
        'generator',
        'generator_ema',
    }
    assert all('lora_' in key or key.startswith('discriminator.') for key in one)
    moved = max(
        (value - start[key]).abs().max()
        for key, value in one.items()
        if key.startswith('generator.')
    )
    assert moved > 20 * TOLERANCE['atol'], (
        'the adapters hardly moved, so the comparison shows nothing'
    )
    for key, value in one.items():
        assert torch.equal(value, parts[key]), key
        torch.testing.assert_close(
            two[key], value, **TOLERANCE, msg=lambda m, key=key: f'{key}: {m}'
        )


@pytest.mark.slow
def test_shards_are_refused(config, tmp_path):
    result = train(
        config,
        tmp_path,
        'strategy.type=FSDP2Strategy',
        'strategy.block_types=JointTransformerBlock,',
        nproc=1,
        codes=None,
    )
    assert (
        result.returncode != 0
        and 'cannot shard weights that networks share (model.lora)' in result.stderr
    )
