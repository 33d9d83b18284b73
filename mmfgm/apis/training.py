# Copyright (c) mmfgm authors.
"""Train what a config describes."""

from mmengine.config import Config

from mmfgm.engine import FlowRunner

from .config import building


def train(cfg: Config, resume: str | None = None) -> FlowRunner:
    """Train to the end.

    Args:
        cfg (Config): With ``launcher`` and ``work_dir``.
        resume (str, optional): A checkpoint to go on from; ``'auto'`` for the last one in the work
            dir, if there is any.

    Returns:
        FlowRunner: After the last iteration.

    Raises:
        UsageError: If the config cannot be built.
    """
    if resume is not None:
        cfg.resume = True if resume == 'auto' else resume
        cfg.load_from = None
    runner = building(lambda: FlowRunner.from_cfg(cfg))
    building(runner.prepare)
    runner.train()
    return runner
