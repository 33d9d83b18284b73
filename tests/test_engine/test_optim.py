# Copyright (c) mmfgm authors.
import pytest
import torch
from torch import nn

from mmfgm.engine import NetworkOptimWrapper, PerNetworkConstructor
from mmfgm.engine.hooks.ema import NetworkEMAHook
from mmfgm.errors import UsageError
from mmfgm.models import Phase


class Pair(nn.Module):
    phases = dict(online=Phase(trains=('online',)), generator=Phase(trains=('generator',)))

    def __init__(self):
        super().__init__()
        self.online, self.generator = nn.Linear(3, 2), nn.Linear(3, 2)


def adam(**kwargs):
    return dict(optimizer=dict(type='Adam', lr=1e-3, **kwargs))


@pytest.mark.parametrize('max_norm', [None, 0.1])
def test_gradient_norm_before_clipping_and_clipped_step(max_norm):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    before = [p.detach().clone() for p in net.parameters()]
    wrapper = NetworkOptimWrapper(
        torch.optim.SGD(net.parameters(), lr=1.0),
        clip_grad=None if max_norm is None else dict(max_norm=max_norm),
    )
    net(torch.randn(8, 3)).square().sum().backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    wrapper.step()
    torch.testing.assert_close(wrapper.grad_norm, norm)
    step = torch.cat([(p - q).flatten() for p, q in zip(net.parameters(), before)]).norm()
    torch.testing.assert_close(
        step, norm if max_norm is None else torch.tensor(max_norm), rtol=1e-4, atol=0
    )


def test_one_optimizer_for_each_network_with_paramwise_options():
    cfg = dict(online=dict(**adam(), paramwise_cfg=dict(bias_lr_mult=2.0)), generator=adam())
    wrappers = PerNetworkConstructor(cfg)(Pair())
    assert list(wrappers.keys()) == ['online', 'generator']
    assert sorted({group['lr'] for group in wrappers['online'].optimizer.param_groups}) == [
        1e-3,
        2e-3,
    ]


@pytest.mark.parametrize(
    'cfg, match',
    [
        (dict(online=adam()), 'must name the trained networks'),
        (dict(online=adam(), generator=adam(), teacher=adam()), 'must name the trained networks'),
        (dict(online=adam(betas=(0, 0.999)), generator=adam()), 'write 0.0 instead of 0'),
        (
            dict(
                online=dict(clip_grad=dict(type='value', clip_value=1), **adam()), generator=adam()
            ),
            'clip_grad must be',
        ),
        (
            dict(online=dict(accumulative_counts=2, **adam()), generator=adam()),
            'train_cfg.accumulation',
        ),
        (
            dict(online=dict(optimizer=dict(type='AdamV', lr=1e-3)), generator=adam()),
            "online.optimizer.type is 'AdamV'.*did you mean 'Adam",
        ),
    ],
)
def test_bad_settings(cfg, match):
    with pytest.raises(UsageError, match=match):
        PerNetworkConstructor(cfg)(Pair())


def test_none_leaves_out_what_a_base_config_names():
    cfg = dict(online=adam(), generator=adam(), discriminator=None)
    assert list(PerNetworkConstructor(cfg)(Pair()).keys()) == ['online', 'generator']
    with pytest.raises(UsageError, match=r'names \[.online.\]; .* set the others to None'):
        PerNetworkConstructor({**cfg, 'generator': None})(Pair())


class EMAModel(nn.Module):
    ema_source = 'net'
    ema_decays = dict(net_ema=0.9, net_ema_slow=0.99)

    def __init__(self):
        super().__init__()
        for name in ('net', 'net_ema', 'net_ema_slow'):
            setattr(self, name, nn.BatchNorm1d(2))


@pytest.mark.parametrize('ramp_up', [True, False])
def test_ema_is_the_recursion(ramp_up):

    class Runner:
        model, iter = EMAModel(), 0

    hook, runner = NetworkEMAHook(ramp_up), Runner()
    expected = {
        name: getattr(runner.model, name).weight.detach().clone().double()
        for name in EMAModel.ema_decays
    }
    for i in range(5):
        runner.iter = i
        with torch.no_grad():
            runner.model.net.weight.copy_(torch.tensor([i + 1.0, -i]))
            runner.model.net.running_mean += 1
        hook.after_train_iter(runner, i)
        for name, decay in EMAModel.ema_decays.items():
            decay = min(decay, (1 + i) / (10 + i)) if ramp_up else decay
            expected[name] = (
                decay * expected[name] + (1 - decay) * runner.model.net.weight.detach().double()
            )
            torch.testing.assert_close(
                getattr(runner.model, name).weight.double(), expected[name], rtol=1e-5, atol=1e-6
            )
            assert torch.equal(
                getattr(runner.model, name).running_mean, runner.model.net.running_mean
            )


def test_adafactor_is_there_for_those_who_ask():
    """MMEngine would import transformers for it at every start."""
    cfg = dict(optimizer=dict(type='Adafactor', lr=1e-3, relative_step=False))
    wrappers = PerNetworkConstructor(dict(online=cfg, generator=adam()))(Pair())
    assert type(wrappers['online'].optimizer).__name__ == 'Adafactor'
