# Copyright (c) mmfgm authors.
"""The order of Algorithm 1, seen from outside: which phase ran when, on which samples."""

import pytest
from mmengine.config import Config

from mmfgm.apis import read_config
from mmfgm.engine import FlowRunner
from mmfgm.errors import UsageError
from tests.conftest import ROOT, train


@pytest.fixture
def cfg(tiny, tmp_path):
    cfg = read_config(str(tiny / 'fgm.py'))
    cfg.work_dir, cfg.launcher, cfg.evaluations, cfg.log_level = (
        str(tmp_path),
        'none',
        {},
        'WARNING',
    )
    cfg.experiment_name = tmp_path.name
    cfg.train_cfg.max_iters = 2
    del cfg.default_hooks.checkpoint.save_best
    return cfg


def events_of(cfg):
    """(what, id of the samples) for every preparation and loss of two iterations."""
    runner = FlowRunner.from_cfg(cfg)
    runner.prepare()
    model, events = runner.model, []
    prepare, loss = model.prepare, model.loss

    def spy_prepare(batch, differentiable):
        samples = prepare(batch, differentiable)
        events.append(
            ('prepare', differentiable, samples['idx'].tolist(), samples['x_0'].requires_grad)
        )
        return samples

    def spy_loss(phase, samples):
        events.append(
            (phase, samples['idx'].tolist(), next(model.online.parameters()).requires_grad)
        )
        return loss(phase, samples)

    model.prepare, model.loss = spy_prepare, spy_loss
    runner.train()
    return runner, events


def test_fresh_samples_for_every_update(cfg):
    cfg.train_cfg.update(online_updates=3, accumulation=2)
    runner, events = events_of(cfg)
    one = ['prepare', 'online'] * 6 + ['prepare', 'generator'] * 2
    assert [e[0] for e in events] == one * 2
    prepared = [e for e in events if e[0] == 'prepare']
    assert (
        len({tuple(e[2]) for e in prepared})
        == len(prepared)
        == 2 * runner.train_loop.batches_per_iter
    )
    # the graph of the generator exists only where it is needed, psi has gradients only where it is
    # trained
    assert [e[1] == e[3] for e in prepared] == [True] * 16
    assert [e[1] for e in prepared[:8]] == [False] * 6 + [True] * 2
    assert all(e[2] == (e[0] == 'online') for e in events if e[0] != 'prepare')
    assert all(p.requires_grad for p in runner.model.online.parameters())


def test_shared_samples_go_to_the_generator_first(cfg):
    """Then to the first online update; a further one draws fresh samples."""
    cfg.train_cfg.update(online_updates=2, share_samples=True)
    runner, events = events_of(cfg)
    one = ['prepare', 'generator', 'online', 'prepare', 'online']
    assert [e[0] for e in events] == one * 2
    assert runner.train_loop.batches_per_iter == 2
    shared, generator, online, fresh, second = events[:5]
    assert shared[2] == generator[1] == online[1]
    assert fresh[2] == second[1] != shared[2]
    assert (shared[1], fresh[1]) == (True, False)  # with the generator's graph, without


def test_accumulation_is_the_mean_over_micro_batches(cfg):
    """Two micro-batches of 4 take the step that one batch of 8 takes."""
    import torch

    def trained(accumulation, batch_size):
        cfg.model.type, cfg.train_cfg.max_iters = 'RowNoiseFGM', 1
        cfg.train_cfg.accumulation, cfg.train_dataloader.batch_size = accumulation, batch_size
        for name in ('online', 'generator'):
            cfg.optim_wrapper[name].optimizer = dict(type='SGD', lr=6e-2)
        runner = FlowRunner.from_cfg(cfg)
        runner.train()
        return runner.model.online.state_dict()

    # online_updates 1: the first 8 items go to the online phase either way
    one, two = trained(1, 8), trained(2, 4)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    'change, match',
    [
        (dict(online_updates=0), 'online_updates must be a whole number of at least 1, but is 0'),
        (dict(online_updates=1.5), 'online_updates'),
        (dict(accumulation=0), 'accumulation'),
        (dict(share_samples=True, accumulation=2), 'share_samples=False'),
    ],
)
def test_bad_settings(cfg, change, match):
    cfg.train_cfg.update(change)
    with pytest.raises(UsageError, match=match):
        FlowRunner.from_cfg(cfg).prepare()


def test_repository_configs_are_at_most_three_levels_deep():

    def depth(path):
        bases = Config._get_base_files(str(path))
        return 1 + max((depth((path.parent / base).resolve()) for base in bases), default=0)

    configs = list((ROOT / 'configs').rglob('*.py'))
    assert configs and max(map(depth, configs)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    'options, code',
    [
        ((), 0),
        (
            (
                'default_hooks.poison.type=PoisonHook',
                'default_hooks.poison.at=3',
                'default_hooks.poison.network=generator',
            ),
            3,
        ),
    ],
    ids=['done', 'failed'],
)
def test_loader_workers_end_with_the_run(options, code, tiny, tmp_path):
    """Workers ignore SIGTERM, so a process that leaves them to the interpreter's exit never
    ends."""
    train(
        tiny / 'fgm.py',
        tmp_path,
        'train_dataloader.num_workers=1',
        *options,
        codes=(code,),
    )
