# Copyright (c) mmfgm authors.
"""Train what a config describes."""

from contextlib import nullcontext

from mmengine.config import Config

from mmfgm.engine import FlowRunner
from mmfgm.locks import locked
from mmfgm.processes import is_first

from .config import building


def train(cfg: Config, resume: str | None = None) -> FlowRunner:
    """Train to the end; no other run may use the work dir meanwhile.

    Args:
        cfg (Config): With ``launcher`` and ``work_dir``.
        resume (str, optional): A checkpoint to go on from; ``'auto'`` for the last one in the work
            dir, if there is any.

    Returns:
        FlowRunner: After the last iteration.

    Raises:
        UsageError: If the config cannot be built, or another run uses the work dir.
    """
    if resume is not None:
        cfg.resume = True if resume == 'auto' else resume
        cfg.load_from = None
    FlowRunner.check(cfg)
    with locked(cfg.work_dir) if is_first(cfg.launcher) else nullcontext():
        runner = building(lambda: FlowRunner.from_cfg(cfg))
        building(runner.prepare)
        runner.train()
    return runner
