# Copyright (c) mmfgm authors.
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor
from torch.profiler import record_function

from mmfgm.datasets import check_finite_batch, collate
from mmfgm.errors import UsageError
from mmfgm.processes import ignore_stop_signals
from mmfgm.registry import LOOPS


class _Clock:
    """Marks in time that do not wait for the GPU: CUDA events there, ``perf_counter`` elsewhere."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks; on a GPU the caller must know that ``end`` has been reached."""
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


def _init_worker(inner: Callable[[int], None] | None, worker_id: int) -> None:
    ignore_stop_signals()
    if inner is not None:
        inner(worker_id)


@dataclass
class CycleRecord:
    """What one iteration leaves for the log; values stay on the device, so nothing waits for them.

    Args:
        iteration (int): 1 for the first iteration of a run.
        values (dict[str, Tensor]): ``'PHASE/NAME'`` to a scalar; the last update of the phase in
            this iteration.
        marks (dict[str, list]): Phase to its (start, end) marks.
        preparing (list): The marks of what phases spend on loading batches and generating samples.
    """

    iteration: int
    values: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    preparing: list[tuple[Any, Any]] = field(default_factory=list)


@LOOPS.register_module()
class AlternatingTrainLoop(IterBasedTrainLoop):
    """Algorithm 1: the phases of the model in their order, each as often as the config says.

    That cycle, accumulation included, is ONE iteration: intervals of hooks, checkpoints, schedules
    and evaluations count cycles. :class:`~mmfgm.models.FGM` has an ``online`` and a ``generator``
    phase; a model with a single phase, such as :class:`~mmfgm.models.FlowMatching`, is trained by
    the same loop.

    Args:
        runner: The MMEngine runner.
        dataloader (dict): Config of the training data; its sampler must be infinite and able to
            ``skip``.
        max_iters (int): Iterations (cycles) of the run.
        accumulation (int): Micro-batches summed into each update. Defaults to 1.
        share_samples (bool): Generate once a cycle and use the samples for the first update of
            every phase, which saves a generator forward, instead of drawing fresh noise for each
            update as Algorithm 1 is written. The phase that differentiates them then comes first: a
            gradient on samples that the online network was just fitted to is biased. Further
            updates of a phase draw fresh samples. Defaults to False.
        share_velocity (bool): Also evaluate the online network once for the first update of both
            phases, at the same noise and times: 9 passes of a network instead of 10 with
            ``share_samples`` and 11 without. The gradients are those of separate evaluations;
            accumulation keeps the graph of one micro-batch. Not with FSDP2. Defaults to False.
        **updates (int): ``PHASE_updates`` is how often a phase of the model runs in a cycle, for
            example ``online_updates=5``. Defaults to 1 each.

    Raises:
        UsageError: For counts below 1, settings that do not go together, or updates of a phase that
            the model does not have.
    """

    def __init__(
        self,
        runner,
        dataloader: dict,
        max_iters: int,
        accumulation: int = 1,
        share_samples: bool = False,
        share_velocity: bool = False,
        **updates: int,
    ):
        for name, value in dict(max_iters=max_iters, accumulation=accumulation, **updates).items():
            if not isinstance(value, int) or value < 1:
                raise UsageError(
                    f'train_cfg.{name} must be a whole number of at least 1, but is {value!r}'
                )
        if share_samples and not share_velocity and accumulation > 1:
            raise UsageError(
                'train_cfg.share_samples keeps the graph of a whole cycle, so it would hold '
                f'accumulation={accumulation} graphs at once; set share_samples=False'
            )
        if isinstance(dataloader, dict):
            dataloader = copy.deepcopy(dataloader)
            # all ranks must shuffle alike, and a resumed run like the one it continues
            dataloader['sampler'].setdefault('seed', runner.strategy.randomness['seed'])
            dataloader.setdefault('collate_fn', dict(type=collate))
            # batches are copied to the GPU while it computes
            dataloader.setdefault('pin_memory', torch.cuda.is_available())
        super().__init__(runner, dataloader, max_iters)
        if not hasattr(self.dataloader.sampler, 'skip'):
            raise UsageError(
                'train_dataloader.sampler must be an InfiniteSampler, which can resume at any'
                f' sample, but is {type(self.dataloader.sampler).__name__}'
            )
        # signals reach loader workers too; the training process ends them when it stops
        self.dataloader.worker_init_fn = partial(_init_worker, self.dataloader.worker_init_fn)
        self.updates = updates
        self.accumulation = accumulation
        self.share_samples = share_samples or share_velocity
        self.share_velocity = share_velocity
        self.clock = _Clock()
        self.record = CycleRecord(0)

    @property
    def schedule(self) -> list[str]:
        """Names of the phases of one cycle, in order."""
        phases = self.runner.model.phases
        order = list(phases)
        if self.share_samples:
            order.sort(key=lambda name: not phases[name].differentiable)
        return [name for name in order for _ in range(self.updates.get(f'{name}_updates', 1))]

    @property
    def batches_per_iter(self) -> int:
        """Batches that one iteration takes from the loader of each process."""
        updates = len(self.schedule)
        if self.share_samples:
            updates -= len(self.runner.model.phases) - 1
        return updates * self.accumulation

    def check_updates(self) -> None:
        """Compare the settings with the phases of the model, which is built after the loop.

        Raises:
            UsageError: If there are updates of a phase that the model does not have, or if the
                phases are to share a velocity and cannot.
        """
        known = [f'{phase}_updates' for phase in self.runner.model.phases]
        for name in self.updates:
            if name not in known:
                raise UsageError(
                    f'expected train_cfg to have no other settings than {known} for the phases of'
                    f' {type(self.runner.model).__name__}, found {name!r}; remove it'
                )
        if self.share_velocity:
            self.runner.model.check_joint()
            if not self.runner.strategy.several_backwards:
                raise UsageError(
                    'train_cfg.share_velocity takes two gradients through one forward, and expects'
                    ' a strategy that keeps weights for both, found'
                    f' {type(self.runner.strategy).__name__}, which frees them after the first; set'
                    ' share_velocity=False, or strategy.type=DDPStrategy'
                )

    def run(self):
        """Train to ``max_iters``; returns the model."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        if self._iter > 0:
            self.dataloader.sampler.skip(
                self._iter * self.batches_per_iter * self.dataloader.batch_size
            )
        # made before the first iteration, because making it draws from the random state that hooks
        # restore
        self._batches = iter(self.dataloader)
        self.runner.model.train()
        try:
            while self._iter < self._max_iters and not self.stop_training:
                self.run_iter()
        finally:
            # they ignore SIGTERM, by which the interpreter ends them, and it would wait for ever
            if self.dataloader.num_workers:
                self._batches._shutdown_workers()
        self._epoch += 1
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_iter(self) -> None:
        """One cycle."""
        self.runner.call_hook('before_train_iter', batch_idx=self._iter)
        self.record = CycleRecord(self._iter + 1)
        self.runner.model.iteration = self._iter
        schedule = self.schedule
        shared = None
        if self.share_velocity:
            schedule = schedule[self._update_jointly() :]
        elif self.share_samples:
            shared = self._prepare(differentiable=True)
        for phase in schedule:
            first = phase not in self.record.marks
            with self._marked(phase):
                self._update(phase, shared if first else None)
        # hooks of others ask for both, though a cycle has several batches
        self.runner.call_hook(
            'after_train_iter', batch_idx=self._iter, data_batch=None, outputs=None
        )
        self._iter += 1

    @contextmanager
    def _marked(self, phase: str) -> Iterator[None]:
        """Around work of a phase: marked in time, and named for the profiler."""
        start = self.clock.mark()
        with record_function(f'{phase} phase'):
            yield
        self.record.marks.setdefault(phase, []).append((start, self.clock.mark()))

    def _prepare(self, differentiable: bool) -> dict:
        model = self.runner.model
        start = self.clock.mark()
        with model.autocast():
            batch = next(self._batches)
            check_finite_batch(batch, self.dataloader.dataset)
            samples = model.prepare(batch, differentiable)
        self.record.preparing.append((start, self.clock.mark()))
        return samples

    def _update(self, phase: str, shared: dict | None) -> None:
        """One optimizer step of every network that ``phase`` trains, on ``shared`` samples or fresh
        ones."""
        model = self.runner.model
        strategy = self.runner.strategy
        spec = model.phases[phase]
        trained = [getattr(model, name) for name in spec.trains]
        with strategy.frozen(getattr(model, name) for name in spec.freezes):
            means: dict[str, Tensor] = {}
            for i in range(self.accumulation):
                with strategy.accumulating(trained, last=i == self.accumulation - 1):
                    samples = self._prepare(spec.differentiable) if shared is None else shared
                    with model.autocast():
                        losses = model.loss(phase, samples)
                    self._backward(losses, means)
        self._step(phase, means)

    def _update_jointly(self) -> int:
        """The first update of every phase, from losses that share what they can; returns how many
        these are. All gradients are those of the weights before."""
        model = self.runner.model
        networks = {
            phase: [getattr(model, name) for name in spec.trains]
            for phase, spec in model.phases.items()
        }
        trained = {
            phase: [p for network in each for p in network.parameters() if p.requires_grad]
            for phase, each in networks.items()
        }
        means: dict[str, dict[str, Tensor]] = {phase: {} for phase in trained}
        for i in range(self.accumulation):
            last = i == self.accumulation - 1
            with self.runner.strategy.accumulating(chain(*networks.values()), last=last):
                samples = self._prepare(differentiable=True)
                with model.autocast():
                    losses = model.joint_loss(samples)
                for phase in list(losses):
                    with self._marked(phase):
                        # popped, so that what only this phase needs of the graph is freed
                        values = losses.pop(phase)
                        self._backward(values, means[phase], trained[phase], bool(losses))
                        if last:
                            self._step(phase, means[phase])
                    del values
        return len(trained)

    def _backward(
        self,
        losses: dict[str, Tensor],
        means: dict[str, Tensor],
        inputs: list[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """The gradient of a micro-batch's losses, and their values added to ``means``."""
        total = sum(value for name, value in losses.items() if 'loss' in name)
        (total / self.accumulation).backward(inputs=inputs, retain_graph=retain_graph)
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / self.accumulation

    def _step(self, phase: str, means: dict[str, Tensor]) -> None:
        """Step the optimizers of a phase and keep what it leaves for the log."""
        trains = self.runner.model.phases[phase].trains
        for name in trains:
            wrapper = self.runner.optim_wrapper[name]
            wrapper.step()
            wrapper.zero_grad()
            # with several networks in one phase, each has its own norm
            key = 'grad_norm' if len(trains) == 1 else f'grad_norm_{name}'
            self.record.values[f'{phase}/{key}'] = wrapper.grad_norm
        self.record.values.update({f'{phase}/{name}': value for name, value in means.items()})
