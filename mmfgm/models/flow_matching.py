# Copyright (c) mmfgm authors.
import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mmfgm.datasets import Couplings
from mmfgm.errors import UsageError
from mmfgm.flow import LinearPath, PathSample, expand_t
from mmfgm.registry import MODELS, TASK_UTILS

from .base import FlowModel, Phase
from .checksums import fingerprint
from .sampling import Conditions
from .weights import load_network

EMA = dict(network_ema=0.999)


@MODELS.register_module()
class FlowMatching(FlowModel):
    """Pre-training of a teacher with the ReFlow objective (Eq. 3.6).

    Batches are ``dict(idx, x_0, [eps], cond=dict(...))``. Noise is drawn, unless the batch holds
    it: on couplings ``(eps, x_0)`` of a teacher this is ReFlow (Liu et al., 2022), and its
    distillation with a density that is t = 1 alone. The averages named in ``ema`` are the teachers
    that FGM loads.

    Args:
        network (dict): Config of the velocity network.
        time_sampler (dict): Density of ``t``, for example ``dict(type='LogitNormal', mean=0.,
            std=1.)``.
        ema (dict[str, float]): Average name to decay. Defaults to ``dict(network_ema=0.999)``.
        loss (dict): Config of the loss, called as ``loss(None, v, path)``. Defaults to
            ``dict(type='FlowMatchingLoss')``.
        null_condition (dict, optional): Config that maps conditions to "no condition", for a
            teacher that is to be guided, for example ``dict(type='NullLabel', label=10)``.
        null_prob (float): Probability of training a sample on the null condition. Defaults to 0.
        data_preprocessor (dict, optional): For example ``dict(type='ImagePreprocessor')`` for uint8
            images.
        decoder (dict, optional): Config that turns samples into images, for example
            ``dict(type='LatentDecoder')``.
        teacher (dict, optional): Weights that all networks start from, as ``model.teacher`` of
            :class:`FGM`: ``dict(checkpoint=..., prefix='network_ema')``. Couplings of any other
            teacher are refused.
        networks (Collection[str], optional): Names of those to make, see :meth:`FlowModel.build`.
    """

    phases = dict(network=Phase(trains=('network',)))
    ema_source = 'network'

    def __init__(
        self,
        network: dict,
        time_sampler: dict,
        ema: dict[str, float] | None = None,
        loss: dict | None = None,
        null_condition: dict | None = None,
        null_prob: float = 0.0,
        data_preprocessor: dict | None = None,
        decoder: dict | None = None,
        teacher: dict | None = None,
        networks: Collection[str] | None = None,
    ):
        super().__init__(data_preprocessor, decoder)
        if null_prob and null_condition is None:
            raise UsageError(
                f'null_prob={null_prob} needs null_condition, for example dict(type="NullLabel",'
                ' label=10)'
            )
        ema = dict(EMA if ema is None else ema)
        self._check_ema(ema)
        wanted = self._choose(self.network_names(dict(ema=ema)), networks)
        first = MODELS.build(network)
        self._describe(first)
        # what tells the weights that training starts from, before it changes them
        self.teacher_weights: str | None = None
        if teacher and teacher['checkpoint'] is not None:
            self.teacher_weights = fingerprint(load_network(first, **teacher))
        for name in wanted:
            made = first if name == wanted[0] else copy.deepcopy(first)
            self.add_module(name, made if name == 'network' else made.requires_grad_(False))
        self.ema_decays = {name: decay for name, decay in ema.items() if name in wanted}
        self.loss_fm = MODELS.build(loss or dict(type='FlowMatchingLoss'))
        self.time_sampler = TASK_UTILS.build(time_sampler)
        self.null = TASK_UTILS.build(null_condition) if null_condition else None
        self.null_prob = null_prob

    @classmethod
    def network_names(cls, cfg: dict) -> list[str]:
        return ['network', *(EMA if cfg.get('ema') is None else cfg['ema'])]

    def check_data(self, dataset: Any) -> None:
        """Hold couplings against the teacher that must have drawn them.

        Raises:
            UsageError: See :meth:`~mmfgm.datasets.Couplings.check_teacher`.
        """
        if isinstance(dataset, Couplings):
            dataset.check_teacher(self.teacher_weights, self.event_shape, self.num_classes)

    def _drop_conditions(self, cond: Conditions, n: int, device) -> Conditions:
        if not self.null_prob:
            return cond
        drop = torch.rand(n, device=device) < self.null_prob
        null = self.null(cond)
        return {k: torch.where(expand_t(drop, v).bool(), null[k], v) for k, v in cond.items()}

    def _noised(self, samples: dict[str, Any]) -> tuple[PathSample, Conditions]:
        """Data at random times, and the conditions that are not dropped."""
        x_0 = samples['x_0']
        cond = self._drop_conditions(samples['cond'], len(x_0), x_0.device)
        t = self.time_sampler(len(x_0), x_0.device)
        return LinearPath.sample(x_0, t, samples.get('eps')), cond

    def loss(self, phase: str, samples: dict[str, Any]) -> dict[str, Tensor]:
        path, cond = self._noised(samples)
        v = self.network(path.x_t, path.t, **cond)
        return self.loss_fm(None, v, path)  # (3.6)
