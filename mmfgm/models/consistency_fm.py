# Copyright (c) mmfgm authors.
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.flow import LinearPath
from mmfgm.registry import MODELS

from .flow_matching import FlowMatching


@MODELS.register_module()
class ConsistencyFM(FlowMatching):
    """Consistency Flow Matching (Yang et al., 2024): a flow whose velocity is the same along each
    path, so that one Euler step for each segment of time samples it.

    Batches are those of :class:`FlowMatching`, couplings included. Sample it with ``nfe`` equal to
    the loss's ``segments``.

    Args:
        network (dict), time_sampler (dict), ema (dict[str, float]), networks (Collection[str]): As
            for :class:`FlowMatching`.
        target (str): The network whose velocity at the earlier time is matched, without gradient:
            an average, as the authors' paper has it, or ``'network'`` itself, as their code does
            (whose network has no dropout). Defaults to ``'network_ema'``.
        start (int): Iterations of flow matching before that, in which no target is needed: the
            authors' ``boundary=0``. Defaults to 0.
        loss (dict, optional): Defaults to ``dict(type='VelocityConsistencyLoss')``.
        **kwargs: Further arguments of :class:`FlowMatching`.

    Raises:
        UsageError: If there is no such target.
    """

    def __init__(
        self,
        network: dict,
        time_sampler: dict,
        ema: dict[str, float] | None = None,
        loss: dict | None = None,
        target: str = 'network_ema',
        start: int = 0,
        networks: Collection[str] | None = None,
        **kwargs: Any,
    ):
        loss = loss or dict(type='VelocityConsistencyLoss')
        super().__init__(network, time_sampler, ema, loss, networks=networks, **kwargs)
        known = self.network_names(dict(ema=ema))
        # a part that only samples needs no target
        if networks is None and target not in known:
            raise UsageError(
                f'model.target must be one of the networks {known}, but is {target!r}; name one, or'
                ' add the average to model.ema'
            )
        self.target = target
        self.start = start

    def loss(self, phase: str, samples: dict[str, Any]) -> dict[str, Tensor]:
        path, cond = self._noised(samples)
        u = None
        if self.iteration >= self.start:
            r = self.loss_fm.earlier(path.t)
            with torch.no_grad():
                x_r = LinearPath.interpolate(path.x_0, path.eps, r)
                u = self.networks[self.target](x_r, r, **cond)
        v = self.network(path.x_t, path.t, **cond)
        return self.loss_fm(u, v, path)
