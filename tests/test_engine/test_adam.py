# Copyright (c) mmfgm authors.
import copy

import pytest
import torch

from mmfgm.engine import MomentumFreeAdam
from mmfgm.errors import UsageError
from mmfgm.models import read_state_dict
from mmfgm.models.weights import read_pickle
from tests.conftest import train
from tests.test_engine.test_parallel import FSDP2
from tests.test_engine.test_resume import assert_same, hook_options

SHAPES = [(7, 5), (33,), (), (4, 3, 3, 3)]


def gradients(step):
    """Of many scales, with zeros; the third parameter has none at odd steps."""
    generator = torch.Generator().manual_seed(step)
    scales = (0.0, 1e-30, 1e-12, 1e-4, 1.0, 1e4, 1e10)
    for i, shape in enumerate(SHAPES):
        scale = torch.tensor(scales)[torch.randint(len(scales), shape, generator=generator)]
        yield None if i == 2 and step % 2 else torch.randn(shape, generator=generator) * scale


def make(cls, weight_decay=0.0, **kwargs):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [dict(params=params[:2], lr=1e-2), dict(params=params[2:], lr=3e-4, eps=1e-6)]
    optimizer = cls(groups, betas=(0.0, 0.999), weight_decay=weight_decay, **kwargs)
    return params, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=50)


def run(params, optimizer, scheduler, steps):
    for step in steps:
        for p, grad in zip(params, gradients(step)):
            p.grad = grad
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
@pytest.mark.parametrize('foreach', [False, True])
def test_updates_are_those_of_torch(foreach, weight_decay):
    ours, theirs = (
        make(MomentumFreeAdam, weight_decay),
        make(torch.optim.Adam, weight_decay, foreach=foreach),
    )
    start = [p.detach().clone() for p in ours[0]]
    run(*ours, range(100))
    run(*theirs, range(100))
    for p, q, before in zip(ours[0], theirs[0], start):
        assert torch.equal(p, q) and not torch.equal(p, before)
        assert torch.equal(ours[1].state[p]['exp_avg_sq'], theirs[1].state[q]['exp_avg_sq'])


def test_state_is_half_of_torchs():
    ours, theirs = make(MomentumFreeAdam), make(torch.optim.Adam)
    run(*ours, range(1))
    run(*theirs, range(1))
    moments, expected = (
        [
            value
            for state in optimizer.state.values()
            for name, value in state.items()
            if name != 'step'
        ]
        for _, optimizer, _ in (ours, theirs)
    )
    assert 2 * sum(value.nbytes for value in moments) == sum(value.nbytes for value in expected) > 0
    assert {name for state in ours[1].state.values() for name in state} == {'step', 'exp_avg_sq'}


@pytest.mark.parametrize(
    'first', [MomentumFreeAdam, torch.optim.Adam], ids=['its own', 'torch Adam']
)
def test_continues_a_state(first):
    whole, begun, resumed = make(MomentumFreeAdam), make(first), make(MomentumFreeAdam)
    run(*whole, range(40))
    run(*begun, range(20))
    with torch.no_grad():
        for p, q in zip(resumed[0], begun[0]):
            p.copy_(q)
    resumed[1].load_state_dict(copy.deepcopy(begun[1].state_dict()))
    resumed[2].load_state_dict(begun[2].state_dict())
    run(*resumed, range(20, 40))
    for p, q in zip(resumed[0], whole[0]):
        assert torch.equal(p, q)
        assert set(resumed[1].state[p]) == {'step', 'exp_avg_sq'}


def test_bad_settings():
    params = [torch.nn.Parameter(torch.zeros(1))]
    for bad, match in [
        (dict(betas=(0.9, 0.999)), "use torch's Adam"),
        (dict(betas=(0.0, 1.0)), r'beta2 in \[0, 1\)'),
        (dict(lr=-1.0), 'lr .* must be at least 0'),
        (dict(eps=float('nan')), 'eps .* must be at least 0'),
    ]:
        with pytest.raises(UsageError, match=match):
            MomentumFreeAdam(params, **bad)
    with pytest.raises(UsageError, match="use torch's Adam"):
        MomentumFreeAdam(params).load_state_dict(torch.optim.Adam(params).state_dict())


@pytest.fixture(scope='module')
def configs(tiny):
    """The tiny FGM run with either optimizer, which differ in nothing else."""
    for kind in ('MomentumFreeAdam', 'Adam'):
        # a large eps keeps float32 noise in tiny gradients from becoming full steps
        optimizer = f"_delete_=True, type='{kind}', betas=(0.0, 0.999), eps=1.5e-4"
        networks = ', '.join(
            f'{name}=dict(optimizer=dict({optimizer}, lr={lr}))'
            for name, lr in (('online', 4e-3), ('generator', 2e-3))
        )
        (tiny / f'{kind}.py').write_text(
            "_base_ = ['fgm.py']\nmodel = dict(type='RowNoiseFGM')\n"
            f'optim_wrapper = dict({networks})\nevaluations = dict(fd=dict(interval=0))\n'
            'default_hooks = dict(checkpoint=dict(interval=4))\n'
        )
    return tiny


@pytest.mark.slow
def test_trains_like_torchs_adam_on_one_process_and_sharded(configs, tmp_path):
    train(configs / 'MomentumFreeAdam.py', tmp_path / 'single')
    train(configs / 'Adam.py', tmp_path / 'adam')
    single = read_state_dict(str(tmp_path / 'single'))
    assert_same(single, read_state_dict(str(tmp_path / 'adam')))
    states = [
        state
        for optimizer in read_pickle(str(tmp_path / 'single/iter_8.pth'))['optimizer'].values()
        for state in optimizer['state'].values()
    ]
    assert states and all(
        set(state) == {'step', 'exp_avg_sq'} and state['step'] == 8 for state in states
    )

    sharded = (*FSDP2, 'train_dataloader.batch_size=4')
    train(configs / 'MomentumFreeAdam.py', tmp_path / 'sharded', *sharded, nproc=2)
    train(configs / 'Adam.py', tmp_path / 'sharded_adam', *sharded, nproc=2)
    found = read_state_dict(str(tmp_path / 'sharded'))
    assert_same(found, read_state_dict(str(tmp_path / 'sharded_adam')))
    start = read_state_dict(str(configs / 'teacher_run'))
    assert (
        max(
            (value - start[f'network_ema.{key.split(".", 1)[1]}']).abs().max()
            for key, value in single.items()
            if key.startswith('online.')
        )
        > 1e-3
    ), 'the networks hardly moved, so the comparison shows nothing'
    for key, value in single.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f'{key}: {m}'
        )


@pytest.mark.slow
@pytest.mark.parametrize('nproc, strategy', [(0, ()), (2, FSDP2)], ids=['1 process', 'FSDP2'])
def test_stopped_and_resumed_equals_uninterrupted(nproc, strategy, configs, tmp_path):
    config = configs / 'MomentumFreeAdam.py'
    train(config, tmp_path / 'whole', *strategy, nproc=nproc)
    kill = hook_options(type='KillHook', at=6, when='before')
    train(config, tmp_path / 'parts', *strategy, *kill, nproc=nproc, codes=None)
    assert not list((tmp_path / 'parts').glob('iter_8*'))
    result = train(config, tmp_path / 'parts', *strategy, nproc=nproc, resume=True)
    assert 'iter: 4' in result.stdout + result.stderr
    assert_same(read_state_dict(str(tmp_path / 'parts')), read_state_dict(str(tmp_path / 'whole')))
