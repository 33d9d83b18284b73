# Copyright (c) mmfgm authors.
import math
import time

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from torch import nn

from mmfgm.engine.loops import CycleRecord
from mmfgm.errors import NonFiniteError
from mmfgm.models import latest_checkpoint
from mmfgm.processes import local
from mmfgm.registry import HOOKS


def non_finite_networks(networks: dict[str, nn.Module]) -> list[str]:
    """Names of the networks that have an inf or nan among their (local) parameters."""

    return [
        name
        for name, network in networks.items()
        if not all(local(p).isfinite().all() for p in network.parameters())
    ]


@HOOKS.register_module()
class MonitorHook(Hook):
    """Scalars of every phase for the log, and an end to a run that has gone wrong.

    Logs, for each phase, its losses, gradient norm (before clipping) and share of the time, and the
    samples that the last network of a cycle was trained on per second. ``prepare_time`` is the
    seconds of an iteration in which data is loaded and samples are generated, by all the steps of a
    generator. On a GPU the numbers of an iteration are read during the next one, so the step never
    waits for them; a checkpoint is written only after those of its own iteration were found finite.

    Raises:
        NonFiniteError: Names the iteration, the phase and the networks; the last good checkpoint
            stays.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self):
        self._pending: tuple[CycleRecord, torch.Tensor, torch.cuda.Event | None] | None = None

    def before_train(self, runner):
        loop = runner.train_loop
        self._samples = loop.dataloader.batch_size * loop.accumulation * get_world_size()
        self._seconds = runner.message_hub.runtime_info.get('train_seconds', 0.0)
        self._last = self._start = time.perf_counter()

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._start = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        now = time.perf_counter()
        # since the last iteration's end: evaluations, pictures and checkpoints count as training
        # time
        self._seconds += now - self._last
        self._last = now
        runner.message_hub.update_info('train_seconds', self._seconds)
        record = runner.train_loop.record
        values = torch.stack([value.float() for value in record.values.values()])
        if values.is_cuda:
            self._read(runner)
            host = torch.empty_like(values, device='cpu', pin_memory=True).copy_(
                values, non_blocking=True
            )
            reached = torch.cuda.Event()
            reached.record()
            self._pending = record, host, reached
        else:
            self._pending = record, values, None
            self._read(runner)
        # on a GPU the read above waited for the iteration before, so this is the pace of the GPU,
        # not of the launches
        pace = self._samples / (time.perf_counter() - self._start)
        runner.message_hub.update_scalar('train/samples_per_second', pace)

    def before_save_checkpoint(self, runner, checkpoint):
        if self._pending is not None:
            self._read(runner)
            checkpoint['message_hub'] = runner.message_hub.state_dict()

    def after_train(self, runner):
        self._read(runner)

    def _read(self, runner) -> None:
        if self._pending is None:
            return
        record, host, reached = self._pending
        self._pending = None
        if reached is not None:
            reached.synchronize()
        values = dict(zip(record.values, host.tolist()))
        for name, value in values.items():
            if not math.isfinite(value):
                self._stop(runner, record.iteration, name, values)
            runner.message_hub.update_scalar(f'train/{name}', value)
        clock = runner.train_loop.clock
        seconds = {
            phase: sum(clock.seconds(*m) for m in marks) for phase, marks in record.marks.items()
        }
        for phase, spent in seconds.items():
            runner.message_hub.update_scalar(
                f'train/{phase}/time_share', spent / max(sum(seconds.values()), 1e-9)
            )
        preparing = sum(clock.seconds(*m) for m in record.preparing)
        runner.message_hub.update_scalar('train/prepare_time', preparing)

    @staticmethod
    def _stop(runner, iteration: int, name: str, values: dict[str, float]) -> None:
        phase, what = name.split('/')
        trained = ', '.join(runner.model.phases[phase].trains)
        damaged = non_finite_networks(runner.model.networks)
        last = latest_checkpoint(runner.work_dir)
        same_phase = {k: v for k, v in values.items() if k.startswith(f'{phase}/')}
        fixed = [name for name in damaged if name in runner.model.pretrained]
        if fixed:
            # they were whole when they were loaded, and no step changes them
            fix = (
                f'Training does not change {", ".join(fixed)}, so a device or its memory is at'
                ' fault: resume on another'
            )
        else:
            fix = (
                f'The weights that were loaded and the data were finite: training diverged. Lower'
                f' the learning rate of {trained}, or set clip_grad, and resume'
            )
        raise NonFiniteError(
            f'iteration {iteration}, phase {phase!r} (trains {trained}): {what} is {values[name]}.'
            f' Values of the phase: {same_phase}. Networks with non-finite weights:'
            f' {damaged or "none yet"}. No checkpoint was written after it; the last good one is'
            f' {last}. {fix}.'
        )
