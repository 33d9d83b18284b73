# Copyright (c) mmfgm authors.
import torch
from mmengine.hooks import Hook

from mmfgm.processes import local
from mmfgm.registry import HOOKS


@HOOKS.register_module()
class NetworkEMAHook(Hook):
    """Update the model's averages once per iteration: ``ema <- decay ema + (1 - decay) source``.

    The averages and their decays are the model's (``model.ema``). A source that is sharded has
    averages that are sharded alike, so nothing is communicated.

    Args:
        ramp_up (bool): Use ``min(decay, (1 + i) / (10 + i))`` at iteration ``i`` from 0, so that a
            short run is not dominated by its start. Defaults to True.
    """

    priority = 'HIGH'

    def __init__(self, ramp_up: bool = True):
        self.ramp_up = ramp_up

    @torch.no_grad()
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model
        source = getattr(model, model.ema_source)
        buffers = list(source.buffers())
        for name, decay in model.ema_decays.items():
            if self.ramp_up:
                decay = min(decay, (1 + runner.iter) / (10 + runner.iter))
            ema = getattr(model, name)
            torch._foreach_lerp_(
                [local(p) for p in ema.parameters()],
                [local(q) for q in source.parameters()],
                1 - decay,
            )
            for average, current in zip(ema.buffers(), buffers):
                average.copy_(current)
