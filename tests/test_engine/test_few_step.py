# Copyright (c) mmfgm authors.
"""Runs of a few-step generator: stopped and resumed, on several processes, measured and sampled."""

import json

import pytest
import torch

from mmfgm.apis import FGMInferencer, OneStepPipeline, export_generator, read_config
from mmfgm.models import read_state_dict
from mmfgm.tools.generate import generate
from tests.conftest import train
from tests.test_engine.test_parallel import FSDP2, OPTIONS, TOLERANCE, fd_values
from tests.test_engine.test_resume import assert_same, final


@pytest.fixture(scope='module')
def config(tiny, tmp_path_factory):
    """A tiny run of four steps."""
    path = tmp_path_factory.mktemp('few') / 'four.py'
    path.write_text(f"""
_base_ = [{str(tiny / 'fgm.py')!r}]
model = dict(generator=dict(_delete_=True, type='FewStepGenerator', times=4))
evaluations = dict(fd=dict(sampling=dict(nfe=3)))
""")
    return path


@pytest.fixture(scope='module')
def whole(config):
    """Its work dir, after eight iterations."""
    work_dir = config.parent / 'whole'
    train(config, work_dir, 'train_cfg.accumulation=2')
    return work_dir


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted(config, whole, tmp_path):
    options = ('train_cfg.accumulation=2', 'default_hooks.test.type=KillHook')
    kill = ('default_hooks.test.at=5', 'default_hooks.test.when=before')
    train(config, tmp_path, *options, *kill, codes=None)
    assert not (tmp_path / 'iter_8.pth').exists()
    train(config, tmp_path, options[0], resume=True)
    for found, expected in zip(final(tmp_path), final(whole)):
        assert_same(found, expected)


@pytest.fixture(scope='module')
def one_process(config):
    """The work dir of a run on one process, whose noise belongs to the sample."""
    work_dir = config.parent / 'one'
    train(config, work_dir, *OPTIONS)
    return work_dir


@pytest.mark.slow
@pytest.mark.parametrize('strategy', [(), FSDP2], ids=['DDP', 'FSDP2'])
def test_two_processes_equal_one(strategy, config, one_process, tmp_path):
    size = 'train_dataloader.batch_size=4'
    train(config, tmp_path, *OPTIONS, *strategy, size, nproc=2)
    expected, found = (read_state_dict(str(folder)) for folder in (one_process, tmp_path))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **TOLERANCE)
    values = fd_values(one_process)
    assert values and fd_values(tmp_path) == [pytest.approx(v, rel=1e-3) for v in values]


@pytest.mark.slow
def test_a_one_step_run_does_not_go_on_with_four_steps(tiny, config, tmp_path):
    train(tiny / 'fgm.py', tmp_path, 'train_cfg.max_iters=2')
    result = train(config, tmp_path, resume=True, codes=(2,))
    assert 'model.generator.type' in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.slow
def test_a_run_is_measured_and_sampled_at_every_prefix(config, whole, tmp_path):
    from mmfgm.tools.test import test as measure

    out = tmp_path / 'test'
    command = [str(config), str(whole), '--network', 'teacher', 'generator_ema', '--out', str(out)]
    table = measure([*command, '--nfe', '1', '2', '10'])['fd/fd']
    assert list(table['teacher']) == [1, 2, 10] and list(table['generator_ema']) == [1, 2, 4]
    assert len(set(table['generator_ema'].values())) == 3

    inferencer = FGMInferencer(read_config(str(config)), str(whole), device='cpu')
    assert inferencer.default_sampling().nfe == 4
    labels = list(range(5))
    four, one, two, same = (
        torch.stack(inferencer(labels, seeds=7, out='tensor', **options)['predictions'])
        for options in (dict(), dict(nfe=1), dict(nfe=2, batch_size=2), dict(nfe=2))
    )
    torch.testing.assert_close(two, same, rtol=1e-5, atol=1e-6)
    assert (four - two).abs().max() > 1e-3 and (two - one).abs().max() > 1e-3

    pictures = tmp_path / 'pictures'
    options = ['--labels', '1', '2', '--nfe', '2', '--deterministic', '--out', str(pictures)]
    generate([str(config), str(whole), *options])
    lines = [json.loads(line) for line in (pictures / 'metadata.jsonl').read_text().splitlines()]
    assert all(line['nfe'] == 2 and line['deterministic'] for line in lines)

    export_generator(read_config(str(config)), str(whole), str(tmp_path / 'export'))
    pipe = OneStepPipeline.from_pretrained(str(tmp_path / 'export'), device='cpu')
    for options, expected in ((dict(), four), (dict(nfe=2), same)):
        images = pipe(labels=labels, seeds=7, output_type='tensor', **options).images
        torch.testing.assert_close(torch.stack(images), expected, rtol=1e-5, atol=1e-6)
