# Copyright (c) mmfgm authors.
from mmengine.hooks import Hook

from mmfgm.errors import EXIT_PREEMPTED
from mmfgm.processes import StopSignals
from mmfgm.registry import HOOKS

from .checkpoint import CheckpointHook


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM or Ctrl-C, save a checkpoint at the end of the current iteration and exit with
    code 75. A second Ctrl-C ends the process at once.

    With several processes, all of them agree on the iteration, whichever got the signal.
    An evaluation, which may take long, asks in between (:class:`EvaluationHook`).

    Raises:
        SystemExit: With code 75, after the checkpoint is complete.
    """

    # after the regular checkpoint, before a possibly long evaluation
    priority = 95

    def __init__(self):
        self.signals = StopSignals()

    def before_train(self, runner):
        self.signals.begin()

    def after_train(self, runner):
        self.signals.end()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.signals.agreed():
            return
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                hook.save_now(runner)
        self.leave(
            runner,
            f'{self.signals.name}: stopped after iteration {runner.iter + 1} with a checkpoint; go'
            ' on with --resume',
        )

    @staticmethod
    def leave(runner, message: str) -> None:
        """Say why, and exit."""
        runner.logger.warning(message)
        # writes out what TensorBoard has buffered
        runner.visualizer.close()
        raise SystemExit(EXIT_PREEMPTED)
