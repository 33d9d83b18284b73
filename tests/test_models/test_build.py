# Copyright (c) mmfgm authors.
"""Models built in parts."""

import copy

import pytest
import torch
from mmengine.registry import DefaultScope

from mmfgm.errors import UsageError
from mmfgm.models import FGM, FlowMatching, FlowModel, Sampling
from mmfgm.registry import MODELS
from tests.conftest import NETWORK

UNIFORM = dict(type='Uniform')
CONFIG = dict(
    type='FGM',
    network=NETWORK,
    teacher=dict(checkpoint=None),
    fm_time_sampler=UNIFORM,
    fgm_time_sampler=UNIFORM,
    generator=dict(t_star=0.8, c_skip=0.8, c_in=0.8),
    ema=dict(generator_ema=0.9, generator_ema_slow=0.99),
)
TEACHER = dict(type='FlowMatching', network=NETWORK, time_sampler=UNIFORM)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        yield


def batch(n=4):
    idx = torch.arange(n)
    return dict(idx=idx, seed=idx, cond=dict(labels=idx % 10))


@pytest.mark.parametrize(
    'networks',
    [
        ('generator_ema',),
        ('generator_ema_slow', 'generator_ema'),
        ('generator', 'generator_ema'),
        ('teacher', 'generator'),
        ('teacher',),
    ],
)
def test_a_part_samples_as_the_whole(networks):
    whole = FGM.build(CONFIG)
    part = FGM.build(CONFIG, networks)
    assert set(part.networks) == set(networks)
    for name, network in part.networks.items():
        network.load_state_dict(whole.networks[name].state_dict())
        sampling = Sampling(name, nfe=1)
        torch.testing.assert_close(part.sample(batch(), sampling), whole.sample(batch(), sampling))
    others = {p.data_ptr() for p in part.parameters()}
    assert len(others) == len(networks) * len(list(whole.teacher.parameters()))


def test_no_more_networks_are_made_than_asked_for(monkeypatch):
    made = []
    build = MODELS.build
    monkeypatch.setattr(MODELS, 'build', lambda cfg: made.append(cfg['type']) or build(cfg))
    deepcopy = copy.deepcopy
    monkeypatch.setattr(
        'copy.deepcopy', lambda x, *memo: made.append(type(x).__name__) or deepcopy(x, *memo)
    )
    FGM.build(CONFIG, ('generator_ema',))
    assert made.count('AdaLNMLP') == 1
    FGM.build(CONFIG, ('generator_ema', 'teacher'))
    assert made.count('AdaLNMLP') == 3  # one more that is built, and its copy


def test_a_teacher_that_is_not_asked_for_is_not_looked_for():
    cfg = {**CONFIG, 'teacher': dict(checkpoint='nowhere.pth')}
    assert list(FGM.build(cfg, ('generator_ema',)).networks) == ['generator_ema']
    with pytest.raises(UsageError, match="'nowhere.pth' does not exist"):
        FGM.build(cfg, ('teacher',))


def test_flow_matching_in_parts():
    whole = FlowModel.build(TEACHER)
    part = FlowModel.build(TEACHER, ('network_ema',))
    assert isinstance(part, FlowMatching) and list(part.networks) == ['network_ema']
    part.load_state_dict(whole.state_dict(), strict=False)
    sampling = Sampling('network_ema', nfe=2)
    torch.testing.assert_close(part.sample(batch(), sampling), whole.sample(batch(), sampling))


def test_bad_parts():
    with pytest.raises(UsageError, match=r"which are \['teacher', 'online'.*found \['critic'\]"):
        FGM.build(CONFIG, ('critic',))
    with pytest.raises(UsageError, match='expected a model.type that is a FGM, found FlowMatching'):
        FGM.build(TEACHER)
    with pytest.raises(UsageError, match='found a name that is not registered'):
        FGM.build({**CONFIG, 'type': 'FGN'})
