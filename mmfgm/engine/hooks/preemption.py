# Copyright (c) mmfgm authors.
import signal

import torch
import torch.distributed as dist
from mmengine.hooks import Hook

from mmfgm.errors import EXIT_PREEMPTED
from mmfgm.registry import HOOKS

from .checkpoint import CheckpointHook


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM, save a checkpoint at the end of the current iteration and exit with code 75.

    With several processes, all of them agree on the iteration, whichever got the signal.

    Raises:
        SystemExit: With code 75, after the checkpoint is complete.
    """

    # after the regular checkpoint, before a possibly long evaluation
    priority = 95

    def __init__(self):
        self._signalled = False
        self._group = None

    def before_train(self, runner):
        signal.signal(signal.SIGTERM, self._on_signal)
        if runner.distributed:
            # on the CPU, so that asking costs no wait for the GPU
            self._group = dist.new_group(backend='gloo')

    def after_train(self, runner):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_signal(self, signum, frame):
        self._signalled = True

    def _agreed(self) -> bool:
        if self._group is None:
            return self._signalled
        flag = torch.tensor(int(self._signalled))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self._agreed():
            return
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                hook.save_now(runner)
        runner.logger.warning(
            f'SIGTERM: stopped after iteration {runner.iter + 1} with a checkpoint; go on with'
            ' --resume'
        )
        # writes out what TensorBoard has buffered
        runner.visualizer.close()
        raise SystemExit(EXIT_PREEMPTED)
