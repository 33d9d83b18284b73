# Copyright (c) mmfgm authors.
"""Train what a config describes."""

import os.path as osp
from contextlib import nullcontext

import torch
from mmengine.config import Config

from mmfgm.engine import FlowRunner
from mmfgm.errors import UsageError
from mmfgm.files import disk_errors
from mmfgm.locks import locked
from mmfgm.processes import is_first

from .config import building

# of which the last two are seen; the first ones allocate and compile
PROFILED = 6


def train(
    cfg: Config, resume: str | None = None, allow_changes: bool = False, profile: bool = False
) -> FlowRunner:
    """Train to the end; no other run may use the work dir meanwhile.

    Args:
        cfg (Config): With ``launcher`` and ``work_dir``.
        resume (str, optional): A checkpoint to go on from; ``'auto'`` for the last one in the work
            dir, if there is any.
        allow_changes (bool): Go on even where ``cfg`` describes another run than the checkpoint's.
            Defaults to False.
        profile (bool): Profile the first process of a fresh run by MMEngine's ``ProfilerHook``.
            Defaults to False.

    Returns:
        FlowRunner: After the last iteration.

    Raises:
        UsageError: If the config cannot be built, is to be profiled and goes on or ends too soon,
            or another run uses the work dir.
    """
    if profile:
        _profile(cfg, resume)
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


def _profile(cfg: Config, resume: str | None) -> None:
    """Give the first process a hook that profiles."""
    if resume is not None:
        raise UsageError(
            '--profile counts iterations from the start of a run; leave --resume out, and name'
            ' another --work-dir'
        )
    if cfg.train_cfg.max_iters < PROFILED:
        raise UsageError(
            f'--profile needs {PROFILED} iterations, found train_cfg.max_iters='
            f'{cfg.train_cfg.max_iters}; raise it'
        )
    if not is_first(cfg.launcher):
        return
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    hooks = cfg.setdefault('default_hooks', {})
    hooks['profiler'] = dict(
        type='ProfilerHook',
        by_epoch=False,
        profile_times=PROFILED,
        schedule=dict(wait=PROFILED - 3, warmup=1, active=2, repeat=1),
        activity_with_cuda=device == 'cuda',
        on_trace_ready=dict(type='log_trace', sort_by=f'self_{device}_time_total', row_limit=10),
        json_trace_path=osp.join(cfg.work_dir, 'trace.json'),
    )
