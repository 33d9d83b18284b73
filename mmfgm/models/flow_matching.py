# Copyright (c) mmfgm authors.
from typing import Any

import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.flow import LinearPath, expand_t
from mmfgm.registry import MODELS, TASK_UTILS

from .base import FlowModel, Phase
from .losses import flow_matching_loss


@MODELS.register_module()
class FlowMatching(FlowModel):
    """Pre-training of a teacher with the ReFlow objective (Eq. 3.6).

    Batches are ``dict(idx, x_0, [labels, ...])``. The averages named in ``ema`` are the teachers
    that FGM loads.

    Args:
        network (dict): Config of the velocity network.
        time_sampler (dict): Density of ``t``, for example ``dict(type='LogitNormal', mean=0.,
            std=1.)``.
        ema (dict[str, float]): Average name to decay. Defaults to ``dict(network_ema=0.999)``.
        null_condition (dict, optional): Config that maps conditions to "no condition", for a
            teacher that is to be guided, for example ``dict(type='NullLabel', label=10)``.
        null_prob (float): Probability of training a sample on the null condition. Defaults to 0.
        data_preprocessor (dict, optional): For example ``dict(type='ImagePreprocessor')`` for uint8
            images.
        decoder (dict, optional): Config that turns samples into images, for example
            ``dict(type='LatentDecoder')``.
    """

    phases = dict(network=Phase(trains=('network',)))
    ema_source = 'network'

    def __init__(
        self,
        network: dict,
        time_sampler: dict,
        ema: dict[str, float] | None = None,
        null_condition: dict | None = None,
        null_prob: float = 0.0,
        data_preprocessor: dict | None = None,
        decoder: dict | None = None,
    ):
        super().__init__(data_preprocessor, decoder)
        self.network = MODELS.build(network)
        self._describe(self.network)
        self.time_sampler = TASK_UTILS.build(time_sampler)
        if null_prob and null_condition is None:
            raise UsageError(
                f'null_prob={null_prob} needs null_condition, for example dict(type="NullLabel",'
                ' label=10)'
            )
        self.null = TASK_UTILS.build(null_condition) if null_condition else None
        self.null_prob = null_prob
        self._init_ema(dict(network_ema=0.999) if ema is None else ema)

    def _drop_conditions(self, cond: dict[str, Tensor], n: int, device) -> dict[str, Tensor]:
        if not self.null_prob:
            return cond
        drop = torch.rand(n, device=device) < self.null_prob
        null = self.null(cond)
        return {k: torch.where(expand_t(drop, v).bool(), null[k], v) for k, v in cond.items()}

    def loss(self, phase: str, samples: dict[str, Any]) -> dict[str, Tensor]:
        x_0 = samples['x_0']
        cond = self._drop_conditions(self.conditions(samples), len(x_0), x_0.device)
        path = LinearPath.sample(x_0, self.time_sampler(len(x_0), x_0.device))
        v = self.network(path.x_t, path.t, **cond)
        return dict(loss_fm=flow_matching_loss(v, path.velocity).mean())  # (3.6)
