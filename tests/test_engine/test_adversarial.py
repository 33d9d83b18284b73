# Copyright (c) mmfgm authors.
"""FGM with a GAN on a tiny MM-DiT and captioned shapes: three optimizers, features of the online
network, any strategy."""

import functools
import re

import pytest
import torch
from safetensors.torch import load_file

from mmfgm.apis.report import read_run
from mmfgm.models import read_state_dict
from mmfgm.tools import merge_checkpoint
from tests.conftest import ROOT, train

FSDP2 = ('strategy.type=FSDP2Strategy', 'strategy.block_types=JointTransformerBlock,')
TOLERANCE = dict(rtol=1e-4, atol=5e-6)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('shapes') / 'fgm.py'
    path.write_text(f"""
_base_ = [{str(ROOT / 'configs/fgm/shapes.py')!r}]
model = dict(
    type='RowNoiseFGM', teacher=dict(checkpoint=None), gan=dict(head=dict(channels=8)),
    network=dict(config=dict(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16)))
train_dataloader = dict(batch_size=8, num_workers=0)
train_cfg = dict(max_iters=4)
# float32 noise in a tiny gradient must not become a full step
optim_wrapper = dict(
    online=dict(optimizer=dict(eps=3e-6)), generator=dict(optimizer=dict(eps=3e-6)),
    discriminator=dict(optimizer=dict(eps=1e-3, lr=1e-2)))
evaluations = dict(shapes=dict(interval=4, dataset=dict(num_samples=13), batch_size=5,
                               metrics=dict(score=dict(prompts=dict(num_samples=13)))))
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=2), samples=dict(interval=1000)
)
custom_imports = dict(imports=['tests.helpers'])
""")
    return path


RUNS = {
    'shared samples': ('train_cfg.share_samples=True',),
    'accumulation 2': (
        'train_cfg.share_samples=False',
        'train_cfg.accumulation=2',
        'model.network.checkpointing=True',
    ),
}


@pytest.fixture(scope='module')
def single_run(config, tmp_path_factory):
    """A function from a name in ``RUNS`` to the work dir of its run in float32 on one process."""

    @functools.cache
    def run(name):
        work_dir = tmp_path_factory.mktemp('single')
        train(config, work_dir, *RUNS[name])
        return work_dir

    return run


@pytest.fixture(params=RUNS)
def single(request, single_run):
    return RUNS[request.param], single_run(request.param)


def compare(expected, found, **tolerance):
    assert expected.keys() == found.keys()
    assert {key.split('.')[0] for key in found} == {
        'online',
        'discriminator',
        'generator',
        'generator_ema',
    }
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, **tolerance, msg=lambda m, key=key: f'{key}: {m}'
        )


def overall(work_dir):
    return re.findall(r'shapes/score_overall: ([\d.]+)', next(work_dir.glob('*/*.log')).read_text())


@pytest.mark.slow
def test_the_adversarial_term_is_of_the_size_of_the_other(single):
    """Of the gradients on generated samples. With a sum over 3,072 elements in the FGM loss, or a
    head that gives none, their ratio is below the bound."""
    scalars = read_run(str(single[1])).scalars
    fgm, gan = (scalars[f'generator/grad_x_0_{term}'] for term in ('fgm', 'gan'))
    assert len(fgm) == len(gan) == 4
    for iteration, size in fgm.items():
        assert 1e-4 < gan[iteration] / size < 1


@pytest.mark.slow
@pytest.mark.parametrize('strategy', [(), FSDP2], ids=['DDP', 'FSDP2'])
def test_two_processes_equal_one(single, strategy, config, tmp_path):
    options, work_dir = single
    train(config, tmp_path, *options, *strategy, 'train_dataloader.batch_size=4', nproc=2)
    expected = read_state_dict(str(work_dir))
    compare(expected, read_state_dict(str(tmp_path)), **TOLERANCE)
    before = read_state_dict(str(work_dir / 'iter_2.pth'))
    for key in ('discriminator.layers.0.weight', 'online.transformer.context_embedder.weight'):
        assert (expected[key] - before[key]).abs().max() > 20 * TOLERANCE['atol'], (
            f'{key} hardly moved: this shows nothing'
        )
    assert overall(tmp_path) == overall(work_dir) != []


@pytest.mark.slow
def test_bf16_shards_train_as_one_process(config, single_run, tmp_path):
    """Accumulation, block-wise checkpointing and the bf16 policy at once.

    How far bf16 takes a run from float32 depends on the processor's kernels and is measured on the
    spot. Two processes share most of that error with one: the same weights, activations and
    samples are rounded, and only sums over a batch are split elsewhere. So they may differ from
    one process by no more than that error (0.1 to 0.4 of it on AVX2 and SSE4.1; gradients summed
    instead of averaged make 1.9 to 4.6 of it). In float32 two processes equal one (above), so one
    such run is the truth for both.
    """
    options = (
        *FSDP2,
        *RUNS['accumulation 2'],
        'strategy.precision=bf16',
        'evaluations.shapes.interval=0',
    )
    train(config, tmp_path / 'one', *options, nproc=1)
    train(config, tmp_path / 'two', *options, 'train_dataloader.batch_size=4', nproc=2)
    exact, one, two = (
        read_state_dict(str(work_dir))
        for work_dir in (single_run('accumulation 2'), tmp_path / 'one', tmp_path / 'two')
    )
    before = read_state_dict(str(single_run('accumulation 2') / 'iter_2.pth'))

    def distance(a, b, network):
        keys = [key for key in exact if key.startswith(f'{network}.')]
        return torch.cat([(a[key] - b[key]).flatten() for key in keys]).norm()

    for network in ('online', 'discriminator', 'generator'):
        rounding = distance(one, exact, network)
        # rounding that hides what two iterations do would hide mistakes as well
        assert 0 < rounding < 0.5 * distance(exact, before, network), network
        assert distance(one, two, network) < rounding, network


@pytest.mark.slow
def test_two_processes_resume_on_one(config, tmp_path):
    options = (*FSDP2, 'train_cfg.share_samples=False', 'evaluations.shapes.interval=0')
    train(config, tmp_path / 'two', *options, 'train_dataloader.batch_size=4', nproc=2)
    # killed, not shortened: the schedules run to the end of the whole run
    train(
        config,
        tmp_path / 'split',
        *options,
        'train_dataloader.batch_size=4',
        'default_hooks.kill.type=KillHook',
        'default_hooks.kill.at=3',
        'default_hooks.kill.when=before',
        nproc=2,
        codes=None,
    )
    assert (tmp_path / 'split' / 'last_checkpoint').read_text().endswith('iter_2.pth')
    train(config, tmp_path / 'split', *options, nproc=1, resume=True)
    compare(
        read_state_dict(str(tmp_path / 'two')),
        read_state_dict(str(tmp_path / 'split')),
        **TOLERANCE,
    )

    # and the shards of two processes become one file
    merge_checkpoint.main(
        [str(tmp_path / 'two'), str(tmp_path / 'one.safetensors'), '--network', 'generator_ema']
    )
    merged, sharded = (
        load_file(tmp_path / 'one.safetensors'),
        read_state_dict(str(tmp_path / 'two')),
    )
    assert {f'generator_ema.{key}' for key in merged} == {
        key for key in sharded if key.startswith('generator_ema.')
    }
    assert all(torch.equal(value, sharded[f'generator_ema.{key}']) for key, value in merged.items())
    for more in (
        [],
        ['--force', '--network', 'teacher'],
    ):  # it exists; a teacher is not in checkpoints
        with pytest.raises(SystemExit) as stopped:
            merge_checkpoint.main([str(tmp_path / 'two'), str(tmp_path / 'one.safetensors'), *more])
        assert stopped.value.code == 2
