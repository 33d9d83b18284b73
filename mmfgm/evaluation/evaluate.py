# Copyright (c) mmfgm authors.
"""Named evaluations: which samples, how many, and what is measured on them.

A config's ``evaluations`` maps a name to::

    dict(interval=100,                                     # iterations; during training
         sampling=dict(network='generator_ema'),           # see mmfgm.models.Sampling
         dataset=dict(type='GenerationDataset', num_samples=10000, num_classes=10),
         batch_size=1000,                                  # per process; does not change the numbers
         metrics=dict(fd=dict(type='FrechetDistance', reference=dict(type='Digits'))))
"""
import time
from dataclasses import dataclass, field
from typing import Dict, Optional

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.logging import MMLogger
from torch.utils.data import DataLoader

from mmfgm.datasets import PaddedSampler, collate
from mmfgm.errors import UsageError
from mmfgm.models import Sampling
from mmfgm.registry import DATASETS, METRICS


@dataclass
class Evaluation:
    """One entry of a config's ``evaluations``; building it builds the data and the metrics' references.

    Args:
        name (str): Its key in the config; metrics are reported as ``name/metric``.
        dataset (dict): Config of the items to generate.
        metrics (dict[str, dict]): Name to config of each metric.
        sampling (dict): Arguments of :class:`~mmfgm.models.Sampling`.
        interval (int): Iterations between evaluations during training; 0 for never.
        batch_size (int): Items per process and network call. Defaults to 1000.
        num_workers (int): Loader processes. Defaults to 0.
    """

    name: str
    dataset: dict
    metrics: Dict[str, dict]
    sampling: dict
    interval: int = 0
    batch_size: int = 1000
    num_workers: int = 0
    loader: DataLoader = field(init=False)

    def __post_init__(self):
        if not isinstance(self.interval, int) or self.interval < 0:
            raise UsageError(f'evaluations.{self.name}.interval must be a whole number of iterations, or 0 for never, but is '
                             f'{self.interval!r}')
        dataset = DATASETS.build(self.dataset)
        self.num_samples = len(dataset)
        self.loader = DataLoader(dataset, self.batch_size, sampler=PaddedSampler(dataset), collate_fn=collate,
                                 num_workers=self.num_workers)
        self.built = {key: METRICS.build(metric) for key, metric in self.metrics.items()}
        for metric in self.built.values():
            metric.check(self.num_samples)

    @torch.no_grad()
    def run(self, model, sampling: Optional[Sampling] = None) -> Dict[str, float]:
        """Generate every item once and measure; the same numbers on any number of processes.

        Args:
            model (FlowModel): Whose samples.
            sampling (Sampling, optional): Instead of the configured one.

        Returns:
            dict[str, float]: ``'name/metric'`` to value.
        """
        sampling = sampling or Sampling(**self.sampling)
        for metric in self.built.values():
            metric.reset(self.num_samples)
        start = last = time.time()
        for i, batch in enumerate(self.loader):
            samples = model.sample(batch, sampling)
            for metric in self.built.values():
                metric.process(batch, samples)
            if is_main_process() and time.time() - last > 30:
                last = time.time()
                eta = (last - start) / (i + 1) * (len(self.loader) - i - 1)
                MMLogger.get_current_instance().info(
                    f'{self.name}: {(i + 1) * self.batch_size * get_world_size()}/{self.num_samples} samples, eta {eta:.0f} s')
        results = {}
        for key, metric in self.built.items():
            values = metric.evaluate(self.num_samples)
            for name, value in values.items():
                # a metric of one number is called by its key in the config
                results[f'{self.name}/{key if len(values) == 1 else f"{key}_{name}"}'] = value
        return results


def build_evaluations(cfg: Optional[dict]) -> Dict[str, Evaluation]:
    """Build a config's ``evaluations``, by name."""
    return {name: Evaluation(name=name, **entry) for name, entry in (cfg or {}).items()}
