# Copyright (c) mmfgm authors.
"""Measure a teacher and a generator, at any list of NFE, beside each other."""

import json
import os.path as osp
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from PIL import Image

from mmfgm.engine import FlowRunner
from mmfgm.errors import Interrupted, UsageError
from mmfgm.evaluation import build_evaluations, draw_over_nfe, draw_panels
from mmfgm.files import disk_errors, write_file
from mmfgm.models import Sampling, load_network
from mmfgm.processes import StopSignals

from .config import building
from .sampling_model import merged_network

Table = dict[str, dict[str, dict[int, float]]]  # metric -> network -> NFE -> value
# of a table with a column for each metric, in a terminal
MOST_COLUMNS = 6
# images of each panel
PICTURED = 100


def build_for_sampling(cfg: Config, networks: Sequence[str], checkpoint: str | None) -> FlowRunner:
    """A runner with the model alone; a teacher that is not asked for is not looked for."""
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'):
        cfg.pop(key, None)
    # with adapters, its weights are the generator's too
    if 'teacher' in cfg.model and 'teacher' not in networks and not cfg.model.get('lora'):
        cfg.model.teacher.checkpoint = None
    cfg.default_hooks = {}
    if cfg.launcher == 'none' and 'strategy' in cfg:
        cfg.strategy = {key: value for key, value in cfg.strategy.items() if key == 'precision'}
    cfg.visualizer = None
    merged = merged_network(checkpoint) if checkpoint else None
    if merged:
        _check_merged(cfg, networks, checkpoint, merged[0])
    runner = building(lambda: FlowRunner.from_cfg(cfg))
    building(lambda: runner.prepare_to_sample(None if merged else checkpoint))
    if merged:
        load_network(runner.model.networks[merged[0]], checkpoint)
    return runner


def _check_merged(cfg: Config, networks: Sequence[str], file: str, name: str) -> None:
    """Whether a file of one network, of ``tools/merge_checkpoint.py``, is all that is needed."""
    others = [network for network in networks if network not in (name, 'teacher')]
    if others:
        raise UsageError(
            f'{file!r} holds {name} alone, not {", ".join(others)}; name its checkpoint or its work'
            ' dir instead'
        )
    if cfg.launcher != 'none' or cfg.model.get('lora'):
        raise UsageError(
            f'{file!r}, of one network, is measured on one process and without model.lora; name its'
            ' checkpoint or its work dir instead'
        )


def samplings_of(
    model,
    networks: Sequence[str],
    nfe: Sequence[int],
    solver: str,
    deterministic: bool = False,
    **settings: Any,
) -> list[Sampling]:
    """One sampling for each network and NFE. A generator takes those of the NFE that it can, and
    always its most; the ``settings`` are of networks that are integrated, but ``deterministic`` of
    generators of few steps."""
    samplings = []
    for network in networks:
        if network not in model.networks:
            raise UsageError(
                f'--network {network}: {type(model).__name__} has the networks'
                f' {list(model.networks)}'
            )
        most = model.generators.get(network)
        if most is None:
            samplings += [Sampling(network, n, solver, **settings) for n in nfe]
        else:
            calls = sorted({most, *(n for n in nfe if 1 <= n <= most)})
            samplings += [
                Sampling(network, n, deterministic=deterministic and most > 1) for n in calls
            ]
    return samplings


def folder_name(sampling: Sampling) -> str:
    """Of what is written for a sampling: network and NFE, and every setting that is not the
    default."""
    names = [sampling.network, str(sampling.nfe), 'nfe']
    for setting in fields(Sampling)[2:]:
        value = getattr(sampling, setting.name)
        names += [] if value == setting.default else [setting.name, str(value)]
    return '_'.join(names)


def format_table(table: Table) -> str:
    """The measured values, one row per network and NFE; of many metrics, one row for each."""
    metrics = list(table)
    measured = [(network, nfe) for network, values in table[metrics[0]].items() for nfe in values]
    rows = [
        ['network', 'NFE', *metrics],
        *(
            [network, str(nfe), *(f'{table[metric][network][nfe]:.4f}' for metric in metrics)]
            for network, nfe in measured
        ),
    ]
    if len(metrics) > MOST_COLUMNS:
        rows = [list(column) for column in zip(*rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def measure(
    cfg: Config,
    checkpoint: str | None,
    networks: Sequence[str] | None = None,
    nfe: Sequence[int] = (50,),
    solver: str = 'euler',
    guidance: float | None = None,
    shift: float | None = None,
    spacing: str = 'uniform',
    deterministic: bool = False,
    evaluation: Sequence[str] | None = None,
    out: str | None = None,
) -> Table:
    """Run the evaluations of a config, and write ``metrics.json`` and the plots.

    Args:
        cfg (Config): With ``launcher`` and ``work_dir``; it is changed.
        checkpoint (str, optional): Checkpoint, work dir, or a file of one network; not needed for
            the teacher alone.
        networks (Sequence[str], optional): Defaults to the one each evaluation names.
        nfe (Sequence[int]): Network evaluations; see :func:`samplings_of`.
        solver (str), guidance (float, optional), shift (float, optional), spacing (str): Of
            networks that are integrated; see :class:`~mmfgm.models.Sampling`.
        deterministic (bool): Of generators of few steps; likewise.
        evaluation (Sequence[str], optional): Which of the config's. Defaults to all.
        out (str, optional): Defaults to ``test`` in the work dir.

    Raises:
        UsageError: If something does not fit the config.
    """
    entries = dict(cfg.get('evaluations') or {})
    unknown = set(evaluation or []) - set(entries)
    if unknown or not entries:
        raise UsageError(
            f'the config has the evaluations {list(entries)}, not {sorted(unknown) or "any"};'
            ' name some of them with --evaluation'
        )
    entries = {name: entries[name] for name in evaluation or entries}
    networks = networks or list({entry.sampling.network: None for entry in entries.values()})
    if checkpoint is None and networks != ['teacher']:
        raise UsageError(f'testing {networks} needs a checkpoint; give its path after the config')
    # a folder of its own: the training's config in the work dir stays as it was
    cfg.work_dir = out or osp.join(cfg.work_dir, 'test')
    with disk_errors(cfg.work_dir, 'start the same command again'):
        return _measure(
            cfg,
            entries,
            networks,
            checkpoint,
            nfe,
            solver,
            guidance=guidance,
            shift=shift,
            spacing=spacing,
            deterministic=deterministic,
        )


def _measure(
    cfg: Config, entries: dict, networks, checkpoint, nfe, solver, **settings: Any
) -> Table:
    runner = build_for_sampling(cfg, networks, checkpoint)
    samplings = samplings_of(runner.model, networks, nfe, solver, **settings)
    for sampling in samplings:
        runner.model.check(sampling)
    evaluations = building(lambda: build_evaluations(entries))
    signals = StopSignals()
    signals.begin()
    try:
        table = _tabulate(runner, cfg, samplings, evaluations, signals)
    except Interrupted as e:
        runner.logger.warning(
            f'{signals.name}: {e}; start the same command again, which goes on with what metrics'
            f' keep of finished items in {cfg.work_dir}'
        )
        raise
    finally:
        signals.end()
    # on every process: sharded networks sample together
    batch = next(iter(next(iter(evaluations.values())).loader))
    if len(runner.model.event_shape) > 1:
        batch = _first(batch, PICTURED)
    best = {sampling.network: sampling for sampling in sorted(samplings, key=lambda s: s.nfe)}
    panels = {
        f'{name}, {sampling.nfe} NFE': runner.model.sample(batch, sampling)
        for name, sampling in best.items()
    }
    if is_main_process():
        _write(cfg.work_dir, table, panels)
    return table


def _first(batch: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        name: _first(value, number) if isinstance(value, dict) else value[:number]
        for name, value in batch.items()
    }


def _tabulate(runner, cfg: Config, samplings, evaluations, signals: StopSignals) -> Table:
    table: Table = {}
    for sampling in samplings:
        for measured in evaluations.values():
            out_dir = osp.join(cfg.work_dir, measured.name, folder_name(sampling))
            values = measured.run(
                runner.model,
                sampling,
                out_dir,
                dict(model=cfg.model, precision=runner.strategy.precision),
                signals.agreed,
            )
            for metric, value in values.items():
                table.setdefault(metric, {}).setdefault(sampling.network, {})[sampling.nfe] = value
                runner.logger.info(
                    f'{sampling.network} at {sampling.nfe} NFE: {metric} = {value:.4f}'
                )
    return table


def _write(out: str, table: Table, panels: dict[str, torch.Tensor]) -> None:
    write_file(osp.join(out, 'metrics.json'), json.dumps(table, indent=2) + '\n')
    for metric, results in table.items():
        Image.fromarray(draw_over_nfe(results, metric)).save(
            osp.join(out, f'{metric.replace("/", "_")}_vs_nfe.png')
        )
    Image.fromarray(draw_panels(panels, nrow=10)).save(osp.join(out, 'samples.png'))
    print(
        f'\n{format_table(table)}\n\nWritten to {out}: metrics.json, samples.png and a plot for'
        ' each metric.'
    )
