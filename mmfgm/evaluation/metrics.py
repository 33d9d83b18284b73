# Copyright (c) mmfgm authors.
"""Metrics over generated samples.

``process(batch, samples)`` sees a batch ``dict(idx, ...)`` and its samples ``(N, *event)``;
``evaluate(size)`` combines all processes. An item whose ``idx`` is at least ``size`` is padding and
does not count.
"""

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, gather_object, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from torch import Tensor
from torch.utils.data import DataLoader

from mmfgm.datasets import collate
from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS, METRICS

from .features import build_feature
from .frechet import StreamingMoments, frechet_distance
from .reference import load_reference
from .wasserstein import sliced_wasserstein


class SampleMetric(BaseMetric):
    """Base of our metrics.

    Attributes:
        pictures (dict[str, np.ndarray]): What there is to look at after ``evaluate``, on the main
            process: name to RGB ``(H, W, 3)`` uint8.
    """

    # of its only value
    name = ''
    # samples without which the metric has no value
    min_samples = 1
    # whether it writes files, and may take up what an interrupted run left there
    saves = False
    # results carry the names of the evaluation and of its metric instead
    default_prefix = ''

    @property
    def value_names(self) -> Sequence[str]:
        """Names of the values of ``evaluate``."""
        return (self.name,)

    def bind(self, dataset: Any) -> None:
        """See the evaluation's dataset, which knows more of an item than what networks take."""

    def check(self, num_samples: int) -> None:
        """Hold the size of an evaluation against the metric, before anything is generated.

        Raises:
            UsageError: If the metric needs more samples.
        """
        if num_samples < self.min_samples:
            raise UsageError(
                f'{type(self).__name__} needs at least {self.min_samples} samples, but the'
                f' evaluation has {num_samples}; raise its dataset.num_samples'
            )

    def reset(
        self, num_samples: int, out_dir: str | None = None, origin: dict | None = None
    ) -> None:
        """Forget everything and expect items ``0 .. num_samples - 1``.

        Args:
            num_samples (int): Number of items.
            out_dir (str, optional): Folder for what the metric writes, if it writes anything.
            origin (dict, optional): All that the samples depend on; files of another origin are not
                taken up.
        """
        self.results = []
        self.num_samples = num_samples
        self.pictures: dict[str, np.ndarray] = {}

    def finished(self) -> Set[int]:
        """Items, the same on every process, that an interrupted run finished, and that need not be
        generated again."""
        return frozenset()

    def release(self) -> None:
        """Free what an evaluation took of the device; called when it ends, also by an error."""

    def real(self, batch: dict, samples: Tensor) -> tuple[list[int], Tensor]:
        """Drop padding: indices and samples of the items that count."""
        idx = [int(i) for i in batch['idx']]
        keep = [row for row, i in enumerate(idx) if i < self.num_samples]
        return [idx[row] for row in keep], samples if len(keep) == len(idx) else samples[keep]

    def compute_metrics(self, results: list) -> dict[str, float]:
        raise NotImplementedError(f'{type(self).__name__} combines processes in evaluate()')

    def _check(self, counted: int, size: int) -> None:
        if counted != size:
            raise UsageError(
                f'{type(self).__name__} saw {counted} samples of {size}: an evaluation must give'
                ' every idx once; use PaddedSampler'
            )


@METRICS.register_module()
class FrechetDistance(SampleMetric):
    """Fréchet distance between generated samples and a reference, on a feature function.

    Args:
        reference (dict | str): Config of a dataset whose items have ``x_0``, or a ``.npz`` file
            with the statistics; see :func:`~mmfgm.evaluation.reference.load_reference`.
        feature (dict): Config of the feature function. Defaults to ``dict(type='Pixels')``.
    """

    name = 'fd'
    min_samples = 2

    def __init__(self, reference: dict | str, feature: dict | None = None):
        super().__init__()
        self.feature = build_feature(feature or dict(type='Pixels'))
        self.reference = load_reference(reference, self.feature)

    def check(self, num_samples: int) -> None:
        super().check(num_samples)
        dim = len(self.reference.mean)
        if num_samples <= dim:
            MMLogger.get_current_instance().warning(
                f'{self.name} of {num_samples} samples has a rank-deficient covariance of {dim}'
                ' features: compare it only with values of as many samples'
            )

    def reset(
        self, num_samples: int, out_dir: str | None = None, origin: dict | None = None
    ) -> None:
        super().reset(num_samples, out_dir, origin)
        self.moments = StreamingMoments(len(self.reference.mean))

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        idx, samples = self.real(data_batch, data_samples)
        if idx:
            self.moments.update(self.feature(samples))

    def evaluate(self, size: int) -> dict[str, float]:
        self.moments.all_reduce()
        self._check(self.moments.n, size)
        return {
            self.name: frechet_distance(
                self.moments.mean, self.moments.cov, self.reference.mean, self.reference.cov
            )
        }


class GatheredMetric(SampleMetric):
    """A metric of all values at once, brought together on the main process and sorted by ``idx``.

    Subclasses say what is kept of a batch (``extract``) and how the whole is judged (``compute``).
    """

    def extract(self, samples: Tensor) -> Tensor:
        """``(N, ...)``: what the metric keeps of each sample."""
        raise NotImplementedError

    def compute(self, values: Tensor) -> dict[str, float]:
        """The metric of the values ``(num_samples, ...)``, float32 on the CPU."""
        raise NotImplementedError

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        idx, samples = self.real(data_batch, data_samples)
        if idx:
            self.results.append((torch.tensor(idx), self.extract(samples).float().cpu()))

    def evaluate(self, size: int) -> dict[str, float]:
        gathered = gather_object(self.results)
        counted = [0]
        values: list[Any] = [None]
        if is_main_process():
            idx = torch.cat(
                [
                    torch.empty(0, dtype=torch.int64),
                    *(idx for results in gathered for idx, _ in results),
                ]
            )
            counted = [len(idx.unique())]
            order = idx.argsort()
            if counted[0] == len(idx) == size:
                values = [
                    self.compute(
                        torch.cat([value for results in gathered for _, value in results])[order]
                    )
                ]
        broadcast_object_list(counted)
        self._check(counted[0], size)
        broadcast_object_list(values)
        return values[0]


@METRICS.register_module()
class SlicedWasserstein(GatheredMetric):
    """Sliced Wasserstein-2 distance between generated points and a reference data set.

    Args:
        reference (dict): Config of a dataset whose items have ``x_0`` of shape ``(d,)``.
        num_projections (int): Number of directions. Defaults to 128.
    """

    name = 'sw2'

    def __init__(self, reference: dict, num_projections: int = 128):
        super().__init__()
        dataset = DATASETS.build(reference)
        self.reference = torch.cat(
            [batch['x_0'] for batch in DataLoader(dataset, 1000, collate_fn=collate)]
        )
        self.num_projections = num_projections

    def extract(self, samples: Tensor) -> Tensor:
        return samples

    def compute(self, values: Tensor) -> dict[str, float]:
        return dict(sw2=sliced_wasserstein(values, self.reference, self.num_projections))
