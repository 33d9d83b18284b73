# Copyright (c) mmfgm authors.
"""Train several configs under the same seeds, and set what came out side by side."""

import json
import os.path as osp
import resource
import statistics
from collections.abc import Sequence
from typing import Any

from mmfgm.errors import UsageError
from mmfgm.files import read_json, write_file
from mmfgm.processes import run_apart

from .config import read_config
from .quickstart import train_stage
from .report import curves_png, read_run


def compare(
    configs: Sequence[str],
    folder: str,
    seeds: Sequence[int] = (0, 1),
    metric: str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, dict]:
    """Train every config under every seed, one after the other, and write ``results.json``,
    ``table.md`` and ``curves.png`` into ``folder``, anew after each run.

    A run that is finished is reused, one that was stopped goes on.

    Args:
        configs (Sequence[str]): Files or packaged names; their base names must differ.
        folder (str): Gets a work dir for each run, ``NAME/seed_N``.
        seeds (Sequence[int]): Of the runs. Defaults to 0 and 1.
        metric (str, optional): ``EVALUATION/METRIC`` of the table. Defaults to that by which the
            first config keeps its best checkpoint.
        options (dict, optional): Changes of every config, as ``--cfg-options`` names them.

    Returns:
        dict: Name of a config to its ``runs``, by seed.

    Raises:
        UsageError: If two configs have one name, there is no metric, or a run has no value of it.
    """
    names = [osp.splitext(osp.basename(config))[0] for config in configs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            f'configs must have different names, but {sorted(twice)} comes twice; rename one, or'
            ' name it once'
        )
    cfgs = [read_config(config, options) for config in configs]
    hooks = cfgs[0].get('default_hooks') or {}
    metric = metric or (hooks.get('checkpoint') or {}).get('save_best')
    if not metric:
        raise UsageError(
            f'{configs[0]} does not say by which metric its checkpoints are kept; name the metric,'
            ' for example --metric fd/fd'
        )
    results: dict[str, dict] = {}
    for seed in seeds:
        for config, name in zip(configs, names):
            work_dir = osp.join(folder, name, f'seed_{seed}')
            chosen = {**(options or {}), 'randomness.seed': seed}
            run = _measured(config, work_dir, chosen, metric)
            results.setdefault(name, {})[str(seed)] = run
            _write(results, folder, metric)
    return results


def _measured(config: str, work_dir: str, options: dict[str, Any], metric: str) -> dict[str, Any]:
    trained = run_apart(_train, config, work_dir, options)  # peak memory is that of this run
    run = read_run(work_dir)
    series = run.scalars.get(metric)
    if not series:
        names = run.cfg.get('evaluations') or {}
        evaluated = sorted(name for name in run.scalars if name.split('/')[0] in names)
        raise UsageError(
            f'the run in {work_dir} has no values of {metric!r}, but of {evaluated}; choose one'
            ' with --metric'
        )
    return dict(curve={k: series[k] for k in sorted(series)}, final=series[max(series)], **trained)


def _train(config: str, work_dir: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train to the end; ``cycles``, seconds of one, and peak memory, which stays beside the run."""
    cycles = read_config(config, options).train_cfg.max_iters
    stage = train_stage(config, work_dir, cycles, options)
    note = osp.join(work_dir, 'peak_memory.json')
    if stage['trained']:
        # kilobytes, as Linux counts it
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_file(note, json.dumps(dict(bytes=peak)) + '\n')
    peak = read_json(note, 'delete the work dir and start again', dict)['bytes']
    return dict(cycles=cycles, seconds_per_cycle=stage['seconds'] / cycles, peak_bytes=peak)


def _mean(curves: list[dict[int, float]]) -> dict[int, float]:
    """Of the runs of all seeds, where all have values."""
    return {
        k: statistics.mean(curve[k] for curve in curves)
        for k in curves[0]
        if all(k in curve for curve in curves)
    }


def _write(results: dict[str, dict], folder: str, metric: str) -> None:
    write_file(osp.join(folder, 'results.json'), json.dumps(results, indent=2) + '\n')
    rows = []
    for name, runs in results.items():
        finals = [run['final'] for run in runs.values()]
        seconds = statistics.median(run['seconds_per_cycle'] for run in runs.values())
        peak = max(run['peak_bytes'] for run in runs.values())
        rows.append(
            [
                name,
                f'{statistics.mean(finals):.4f}',
                ', '.join(f'{value:.4f}' for value in finals),
                str(next(iter(runs.values()))['cycles']),
                f'{1000 * seconds:.0f} ms',
                f'{peak / 2**20:.0f} MiB',
            ]
        )
    rows.sort(key=lambda row: float(row[1]))
    head = ['config', f'{metric}, mean', 'each seed', 'cycles', 'a cycle', 'peak memory']
    lines = [head, ['---'] * len(head), *rows]
    text = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    write_file(osp.join(folder, 'table.md'), text + '\n')
    print(f'\n{text}\n', flush=True)
    curves = {
        name: _mean([run['curve'] for run in runs.values()]) for name, runs in results.items()
    }
    # best first, as in the table
    curves = {row[0]: curves[row[0]] for row in rows}
    write_file(osp.join(folder, 'curves.png'), curves_png({metric: curves}, columns=1))
