# Copyright (c) mmfgm authors.
"""Metrics over generated samples.

``process(batch, samples)`` sees a batch ``dict(idx, ...)`` and its samples ``(N, *event)``;
``evaluate(size)`` combines all processes. An item whose ``idx`` is at least ``size`` is padding and
does not count.
"""
from typing import Dict, List, Sequence, Tuple

import torch
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from torch import Tensor
from torch.utils.data import DataLoader

from mmfgm.datasets import collate
from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS, METRICS, TASK_UTILS

from .frechet import GaussianStats, Moments, frechet_distance
from .wasserstein import sliced_wasserstein


@TASK_UTILS.register_module()
class Pixels:
    """The feature function that is the sample itself, flattened to ``(N, d)``."""

    def __call__(self, samples: Tensor) -> Tensor:
        return samples.flatten(1)


class SampleMetric(BaseMetric):
    """Base of our metrics: one number per evaluation, under ``name``."""

    name = ''
    num_samples = 0
    # results carry the names of the evaluation and of its metric instead
    default_prefix = ''

    def reset(self, num_samples: int) -> None:
        """Forget everything and expect items ``0 .. num_samples - 1``."""
        self.results = []
        self.num_samples = num_samples

    def real(self, batch: dict, samples: Tensor) -> Tuple[List[int], Tensor]:
        """Drop padding: indices and samples of the items that count."""
        idx = [int(i) for i in batch['idx']]
        keep = [row for row, i in enumerate(idx) if i < self.num_samples]
        return [idx[row] for row in keep], samples[keep]

    def compute_metrics(self, results: list) -> Dict[str, float]:
        raise NotImplementedError(f'{type(self).__name__} combines processes in evaluate()')

    def _check(self, counted: int, size: int) -> None:
        if counted != size:
            raise UsageError(f'{type(self).__name__} saw {counted} samples of {size}: an evaluation must give every idx once; '
                             'use PaddedSampler')


@METRICS.register_module()
class FrechetDistance(SampleMetric):
    """Fréchet distance between generated samples and a reference data set, on a feature function.

    Args:
        reference (dict): Config of a dataset whose items have ``x_0``.
        feature (dict): Config of the feature function. Defaults to ``dict(type='Pixels')``.
    """

    name = 'fd'

    def __init__(self, reference: dict, feature: dict = dict(type='Pixels')):
        super().__init__()
        self.feature = TASK_UTILS.build(feature)
        self.reference = self._fit(DATASETS.build(reference))
        self.moments = Moments()

    def _fit(self, dataset) -> GaussianStats:
        moments = Moments()
        for batch in DataLoader(dataset, 1000, collate_fn=collate):
            moments.update(self.feature(batch['x_0']))
        return moments.stats()

    def reset(self, num_samples: int) -> None:
        super().reset(num_samples)
        self.moments = Moments()

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        idx, samples = self.real(data_batch, data_samples)
        if idx:
            self.moments.update(self.feature(samples))

    def evaluate(self, size: int) -> Dict[str, float]:
        self.moments.all_reduce(len(self.reference.mu))
        self._check(self.moments.n, size)
        return {self.name: frechet_distance(self.moments.stats(), self.reference)}


@METRICS.register_module()
class SlicedWasserstein(SampleMetric):
    """Sliced Wasserstein-2 distance between generated points and a reference data set.

    Args:
        reference (dict): Config of a dataset whose items have ``x_0`` of shape ``(d,)``.
        num_projections (int): Number of directions. Defaults to 128.
    """

    name = 'sw2'

    def __init__(self, reference: dict, num_projections: int = 128):
        super().__init__()
        dataset = DATASETS.build(reference)
        self.reference = torch.cat([batch['x_0'] for batch in DataLoader(dataset, 1000, collate_fn=collate)])
        self.num_projections = num_projections

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        idx, samples = self.real(data_batch, data_samples)
        self.results.append((idx, samples.cpu()))

    def evaluate(self, size: int) -> Dict[str, float]:
        parts: Sequence[list] = all_gather_object(self.results)
        points = {i: x for part in parts for idx, samples in part for i, x in zip(idx, samples)}
        self._check(len(points), size)
        # sorted by idx, so that the sum does not depend on who generated what
        samples = torch.stack([points[i] for i in sorted(points)])
        return {self.name: sliced_wasserstein(samples, self.reference, self.num_projections)}
