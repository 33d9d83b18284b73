# Copyright (c) mmfgm authors.
"""The teacher in 8 bits."""

import copy
import sys

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn

from mmfgm.errors import UsageError
from mmfgm.models import FGM
from mmfgm.models.fp8 import to_fp8

pytestmark = pytest.mark.filterwarnings('ignore:model.teacher.fp8')


def rounded(rows):
    """To e4m3, each row scaled by the largest power of two with which it fits."""
    top = torch.finfo(torch.float8_e4m3fn).max
    scale = torch.exp2(torch.floor(torch.log2(top / rows.abs().amax(-1, keepdim=True))))
    return (rows * scale).to(torch.float8_e4m3fn).double() / scale.double()


def test_products_are_those_of_rounded_rows():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 7)).requires_grad_(False)
    layer, small = to_fp8(copy.deepcopy(plain))
    assert type(small) is nn.Linear  # 7 is no multiple of 16
    assert copy.deepcopy(plain).load_state_dict(nn.Sequential(layer, small).state_dict())
    x, g = torch.randn(5, 32, requires_grad=True), torch.randn(5, 48)
    y = layer(x)
    weight, bias = plain[0].weight, plain[0].bias
    expected = rounded(x.detach()) @ rounded(weight).T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.backward(g)
    # the product with the weight sums over its rows, so that columns have the scales
    expected = rounded(g) @ rounded(weight.T).T
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


def build(**settings):
    torch.manual_seed(0)
    network = dict(type='AdaLNMLP', event_shape=(1, 8, 8), width=32, depth=2, embed_dim=16)
    with DefaultScope.overwrite_default_scope('mmfgm'):
        return FGM(
            {**network, **settings.pop('network', {})},
            settings.pop('teacher', dict(checkpoint=None, fp8=True)),
            fm_time_sampler=dict(type='LogitNormal', mean=0.0, std=1.0),
            fgm_time_sampler=dict(type='LogitNormal', mean=0.0, std=1.0),
            **settings,
        )


def test_the_teacher_alone_is_changed():
    model, plain = build(), build(teacher=dict(checkpoint=None))
    kinds = {
        name: {type(module).__name__ for module in network.modules()}
        for name, network in model.networks.items()
    }
    assert [name for name, kind in kinds.items() if 'Float8Linear' in kind] == ['teacher']
    assert model.state_dict().keys() == plain.state_dict().keys()
    for each in (model, plain):
        torch.manual_seed(1)
        for p in [*each.teacher.parameters(), *each.online.parameters()]:
            p.data += 0.1 * torch.randn_like(p)  # the last layer starts at 0
    x_t, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    u, v = model.teacher(x_t, t), plain.teacher(x_t, t)
    assert 0 < (u - v).norm() / v.norm() < 0.2
    torch.testing.assert_close(model.online(x_t, t), plain.online(x_t, t), rtol=0, atol=0)


def test_bad_input(monkeypatch):
    with pytest.raises(UsageError, match='a teacher of its own, found model.lora'):
        build(lora=dict(rank=2, alpha=2, target_modules=('mlp.0',)))
    with pytest.raises(UsageError, match='multiples of 16 for model.teacher.fp8, found none'):
        to_fp8(nn.Linear(7, 7))
    monkeypatch.setitem(sys.modules, 'torchao.float8', None)
    with pytest.raises(UsageError, match='pip install torchao, or set fp8=False'):
        build()
