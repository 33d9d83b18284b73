# Copyright (c) mmfgm authors.
"""Signs of a run that goes wrong, and a look that changes nothing."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmfgm.engine.hooks import WatchHook
from mmfgm.errors import UsageError
from mmfgm.models import read_state_dict
from tests.conftest import train
from tests.test_apis.conftest import DIGITS, make_problem, randomised

ITEMS = dict(type='GenerationDataset', num_samples=64, num_classes=10)
WATCH = (
    'default_hooks.watch.type=WatchHook',
    'default_hooks.watch.interval=2',
    'default_hooks.watch.batch_size=16',
    'default_hooks.watch.lag_updates=3',
    'default_hooks.watch.dataset.type=GenerationDataset',
    'default_hooks.watch.dataset.num_samples=64',
    'default_hooks.watch.dataset.num_classes=10',
)
SHORT = ('train_cfg.max_iters=4', 'evaluations.fd.interval=0', 'default_hooks.samples=None')
FSDP2 = ('strategy.type=FSDP2Strategy', 'strategy.block_types=AdaLNBlock,')


@pytest.mark.slow
@pytest.mark.parametrize(
    'nproc, options', [(0, ()), (2, ()), (2, FSDP2)], ids=['1 process', 'DDP', 'FSDP2']
)
def test_a_look_changes_nothing(nproc, options, tiny, tmp_path):
    """Weights, averages and optimizers of a watched run are those of one that is not."""
    for name, watch in (('plain', ()), ('watched', WATCH)):
        train(tiny / 'fgm.py', tmp_path / name, *SHORT, *options, *watch, nproc=nproc)
    for network in ('online', 'generator', 'generator_ema'):
        plain, watched = (
            read_state_dict(str(tmp_path / name), network=network) for name in ('plain', 'watched')
        )
        assert all(torch.equal(plain[key], watched[key]) for key in plain), network
    scalars = next((tmp_path / 'watched').glob('*/vis_data/scalars.json')).read_text()
    lags = [float(lag) for lag in re.findall(r'"watch/online_lag": (-?[\d.e-]+)', scalars)]
    assert len(lags) == 2 and all(abs(lag) < 1 for lag in lags) and all(lags)


@pytest.mark.slow
def test_a_generator_that_leaves_the_range_is_named(tiny, tmp_path):
    fast = ('optim_wrapper.generator.optimizer.lr=0.3', 'train_cfg.max_iters=8')
    watch = [option for option in WATCH if 'lag' not in option]
    result = train(
        tiny / 'fgm.py', tmp_path, *SHORT[1:], *fast, *watch, 'default_hooks.watch.bound=1.0'
    )
    assert 'saturation_high: saturation is' in result.stdout + result.stderr


def test_lag_is_what_training_the_online_network_alone_would_gain(tmp_path):
    problem = make_problem(tmp_path, DIGITS)
    hook = WatchHook(ITEMS, batch_size=16, lag_updates=3)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = randomised(problem.config)
        model.online.requires_grad_(True)
        optimizer = torch.optim.Adam(model.online.parameters(), lr=3e-3)
        # not at its start: a state that is not put back would show
        sum(hook._terms(model, hook._batch(model, 5, 0))).backward()
        optimizer.step()
        optimizer.zero_grad()
        runs.append((model, optimizer))
    (model, optimizer), (watched, kept) = runs
    unseen = hook._batch(model, 7, 0)

    def loss():
        torch.manual_seed(1)
        with torch.no_grad():
            return float(sum(hook._terms(model, unseen)))

    before = loss()
    for k in range(1, 4):
        sum(hook._terms(model, hook._batch(model, 7, k))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss()
    runner = Hub()
    runner.model, runner.iter = watched, 7
    runner.optim_wrapper = dict(online=SimpleNamespace(optimizer=kept))
    start = {key: value.clone() for key, value in watched.online.state_dict().items()}
    moments = copy.deepcopy(kept.state_dict())
    torch.manual_seed(1)
    lag = hook._lag(runner, hook._batch(watched, 7, 0))
    assert lag == pytest.approx(1 - after / before, rel=1e-5) and abs(lag) > 1e-4
    for key, value in watched.online.state_dict().items():
        assert torch.equal(value, start[key])
    for found, expected in zip(kept.state_dict()['state'].values(), moments['state'].values()):
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class Hub:
    """What a hook needs of a runner to judge a value."""

    def __init__(self):
        self.said = []
        self.logger = self

    def warning(self, message):
        self.said.append(message.split(':')[0])


def test_a_sign_is_named_once_until_it_is_gone():
    hook, hub = WatchHook(ITEMS), Hub()
    for accuracy in (0.7, 0.99, 1.0, 0.9, 0.99, 0.5, 0.6):
        hook._judge(hub, 'd_accuracy', accuracy)
    assert hub.said == ['d_accuracy_high', 'd_accuracy_high', 'd_accuracy_low']
    hook = WatchHook(ITEMS, limits=dict(gan_ratio=(0, math.inf)))
    hook._judge(hub, 'gan_ratio', 1e9)
    assert len(hub.said) == 3


def test_bad_input():
    with pytest.raises(UsageError, match=r"limits of \['gan_ratio', .*found \['accuracy'\]"):
        WatchHook(ITEMS, limits=dict(accuracy=(0, 1)))
    with pytest.raises(UsageError, match='at least 128 items, found 64'):
        WatchHook(ITEMS, lag_updates=1)
    hub = Hub()
    hub.model = nn.Linear(1, 1)
    with pytest.raises(UsageError, match='default_hooks.watch=None'):
        WatchHook(ITEMS).before_run(hub)
