# Copyright (c) mmfgm authors.
import random

import numpy as np
import torch
from mmengine.logging import MessageHub
from torch import nn

from mmfgm.engine.checkpoint import decode_message_hub, encode_message_hub
from mmfgm.engine.hooks.monitor import non_finite_networks
from mmfgm.engine.hooks.rng import get_rng_state, preserve_rng, set_rng_state


def test_non_finite_networks_are_named():
    networks = dict(good=nn.Linear(2, 2), bad=nn.Linear(2, 2), worse=nn.Linear(2, 2))
    with torch.no_grad():
        networks['bad'].bias[1] = float('inf')
        networks['worse'].weight[0, 0] = float('nan')
    assert non_finite_networks(networks) == ['bad', 'worse']


def test_rng_state_round_trips_through_a_file(tmp_path):
    torch.save(get_rng_state(), tmp_path / 'rng.pth')

    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    first = draw()
    set_rng_state(torch.load(tmp_path / 'rng.pth', weights_only=True))
    assert draw() == first


def test_preserve_rng():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with preserve_rng():
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_message_hub_round_trips_through_weights_only(tmp_path):
    hub = MessageHub('source')
    for i in range(5):
        hub.update_scalar('train/online/loss_fm', 0.1 * i)
    hub.update_info('iter', 5)
    hub.update_info('eta', np.float64(3.0))  # not plain: left out
    torch.save(encode_message_hub(hub.state_dict()), tmp_path / 'hub.pth')
    other = MessageHub('target')
    other.load_state_dict(decode_message_hub(torch.load(tmp_path / 'hub.pth', weights_only=True)))
    for x, y in zip(
        hub.get_scalar('train/online/loss_fm').data, other.get_scalar('train/online/loss_fm').data
    ):
        assert x.tolist() == y.tolist()
    assert other.get_info('iter') == 5 and 'eta' not in other.runtime_info
