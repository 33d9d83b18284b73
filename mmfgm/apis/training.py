# Copyright (c) mmfgm authors.
"""Train what a config describes."""

from contextlib import nullcontext

from mmengine.config import Config

from mmfgm.engine import FlowRunner
from mmfgm.files import disk_errors
from mmfgm.locks import locked
from mmfgm.processes import is_first

from .config import building


def train(cfg: Config, resume: str | None = None, allow_changes: bool = False) -> FlowRunner:
    """Train to the end; no other run may use the work dir meanwhile.

    Args:
        cfg (Config): With ``launcher`` and ``work_dir``.
        resume (str, optional): A checkpoint to go on from; ``'auto'`` for the last one in the work
            dir, if there is any.
        allow_changes (bool): Go on even where ``cfg`` describes another run than the checkpoint's.
            Defaults to False.

    Returns:
        FlowRunner: After the last iteration.

    Raises:
        UsageError: If the config cannot be built, or another run uses the work dir.
    """
    if resume is not None:
        cfg.resume = True if resume == 'auto' else resume
        cfg.load_from = None
    FlowRunner.check(cfg)
    lock = locked(cfg.work_dir) if is_first(cfg.launcher) else nullcontext()
    with lock, disk_errors(cfg.work_dir, 'go on with --resume'):
        runner = building(lambda: FlowRunner.from_cfg(cfg))
        runner.allow_changes = allow_changes
        building(runner.prepare)
        runner.train()
    return runner
