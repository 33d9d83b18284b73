# Copyright (c) mmfgm authors.
"""Named evaluations: which samples, how many, and what is measured on them.

A config's ``evaluations`` maps a name to::

    dict(interval=100,                                     # iterations; during training
         sampling=dict(network='generator_ema'),           # see mmfgm.models.Sampling
         dataset=dict(type='GenerationDataset', num_samples=10000, num_classes=10),
         batch_size=1000,                                  # per process; does not change the
         numbers metrics=dict(fd=dict(type='FrechetDistance', reference=dict(type='Digits'))))
"""

import os
import os.path as osp
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.logging import MMLogger
from torch.utils.data import DataLoader

from mmfgm.datasets import PaddedSampler, collate
from mmfgm.errors import Interrupted, UsageError
from mmfgm.models import Sampling, fingerprint
from mmfgm.processes import ignore_stop_signals
from mmfgm.registry import DATASETS, METRICS


@dataclass
class Evaluation:
    """One entry of a config's ``evaluations``; building it builds the data and the metrics'
    references.

    Args:
        name (str): Its key in the config; metrics are reported as ``name/metric``, those of several
            values as ``name/metric_value``, or as ``name/value`` if the metric has the evaluation's
            name.
        dataset (dict): Config of the items to generate.
        metrics (dict[str, dict]): Name to config of each metric.
        sampling (dict): Arguments of :class:`~mmfgm.models.Sampling`.
        interval (int): Iterations between evaluations during training; 0 for never.
        batch_size (int): Items per process and network call. Defaults to 1000.
        num_workers (int): Loader processes. Defaults to 0.
    """

    name: str
    dataset: dict
    metrics: dict[str, dict]
    sampling: dict
    interval: int = 0
    batch_size: int = 1000
    num_workers: int = 0
    loader: Any = field(init=False)  # a DataLoader; its sampler is ours, with `skip`

    def __post_init__(self):
        if not isinstance(self.interval, int) or self.interval < 0:
            raise UsageError(
                f'evaluations.{self.name}.interval must be a whole number of iterations, or 0 for'
                f' never, but is {self.interval!r}'
            )
        if not self.metrics:
            raise UsageError(
                f'evaluations.{self.name} has no metrics; name one, for example '
                "metrics=dict(fd=dict(type='FrechetDistance', reference=...)), or remove it"
            )
        dataset = DATASETS.build(self.dataset)
        self.num_samples = len(dataset)
        self.loader = DataLoader(
            dataset,
            self.batch_size,
            sampler=PaddedSampler(dataset),
            collate_fn=collate,
            num_workers=self.num_workers,
            worker_init_fn=ignore_stop_signals,
        )
        self.built = {key: METRICS.build(metric) for key, metric in self.metrics.items()}
        for metric in self.built.values():
            metric.check(self.num_samples)
            metric.bind(dataset)

    @property
    def value_names(self) -> list[str]:
        """What :meth:`run` reports."""
        return [
            self._name(key, value)
            for key, metric in self.built.items()
            for value in metric.value_names
        ]

    def _name(self, key: str, value: str) -> str:
        if len(self.built[key].value_names) == 1:
            return f'{self.name}/{key}'
        return f'{self.name}/{value if key == self.name else f"{key}_{value}"}'

    def pictures(self) -> dict[str, np.ndarray]:
        """What there is to look at after :meth:`run`, on the main process: name to RGB ``(H, W,
        3)`` uint8."""
        return {
            f'{self.name}_{title}' if key == self.name else f'{self.name}_{key}_{title}': picture
            for key, metric in self.built.items()
            for title, picture in metric.pictures.items()
        }

    def _reset(self, model, sampling: Sampling, out_dir: str | None, config: dict | None) -> None:
        origin, saving = None, [key for key, metric in self.built.items() if metric.saves]
        if out_dir and saving:
            origin = dict(
                sampling=asdict(sampling),
                weights=fingerprint(getattr(model, sampling.network)),
                config=config,
                dataset=self.dataset,
                data=getattr(self.loader.dataset, 'identity', None),
            )
        for key, metric in self.built.items():
            # one metric has the folder to itself, several share it
            folder = osp.join(out_dir, key) if out_dir and saving != [key] else out_dir
            if origin and key in saving:
                os.makedirs(folder, exist_ok=True)
            metric.reset(self.num_samples, folder, origin)
        self.loader.sampler.skip = frozenset.intersection(
            *(frozenset(metric.finished()) for metric in self.built.values())
        )

    @torch.no_grad()
    def run(
        self,
        model,
        sampling: Sampling | None = None,
        out_dir: str | None = None,
        config: dict | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> dict[str, float]:
        """Generate every item once and measure; the same numbers on any number of processes.

        Args:
            model (FlowModel): Whose samples.
            sampling (Sampling, optional): Instead of the configured one.
            out_dir (str, optional): Folder for what the metrics write beside their numbers. Items
                that an interrupted run into it finished are not generated again, if weights,
                sampling, data and ``config`` are the same.
            config (dict, optional): What else the samples depend on, such as the model's config.
            stop (Callable, optional): Asked before every batch, on all processes, whether to end
                here.

        Returns:
            dict[str, float]: ``'name/metric'`` to value.

        Raises:
            Interrupted: If ``stop()`` is true.
        """
        try:
            return self._run(model, sampling or Sampling(**self.sampling), out_dir, config, stop)
        finally:
            # whoever goes through the items next wants all of them
            self.loader.sampler.skip = frozenset()
            for metric in self.built.values():
                metric.release()

    def _run(
        self,
        model,
        sampling: Sampling,
        out_dir: str | None,
        config: dict | None,
        stop: Callable[[], bool] | None,
    ) -> dict[str, float]:
        self._reset(model, sampling, out_dir, config)
        finished = len(self.loader.sampler.skip)
        start = last = time.monotonic()
        batches = iter(self.loader)
        try:
            for i, batch in enumerate(batches):
                self._ask(stop, i)
                samples = model.sample(batch, sampling)
                for metric in self.built.values():
                    metric.process(batch, samples)
                if is_main_process() and time.monotonic() - last > 30:
                    last = time.monotonic()
                    eta = (last - start) / (i + 1) * (len(self.loader) - i - 1)
                    done = min(
                        finished + (i + 1) * self.batch_size * get_world_size(), self.num_samples
                    )
                    MMLogger.get_current_instance().info(
                        f'{self.name}: {done}/{self.num_samples} samples, eta {eta:.0f} s'
                    )
        finally:
            # they ignore SIGTERM, by which the interpreter ends them, and it would wait for ever
            if self.num_workers:
                batches._shutdown_workers()
        # what follows takes long with some metrics
        self._ask(stop, len(self.loader))
        results = {}
        for key, metric in self.built.items():
            for name, value in metric.evaluate(self.num_samples).items():
                results[self._name(key, name)] = value
        return results

    def _ask(self, stop: Callable[[], bool] | None, done: int) -> None:
        if stop is not None and stop():
            raise Interrupted(
                f'stopped in the evaluation {self.name}, after {done} of {len(self.loader)} batches'
            )


def build_evaluations(cfg: dict | None) -> dict[str, Evaluation]:
    """Build a config's ``evaluations``, by name."""
    return {name: Evaluation(name=name, **entry) for name, entry in (cfg or {}).items()}
