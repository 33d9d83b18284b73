# Copyright (c) mmfgm authors.
"""A run as one HTML file."""

import os.path as osp
from collections.abc import Sequence

from mmfgm.apis.config import read_config
from mmfgm.apis.runs import is_work_dir
from mmfgm.errors import UsageError
from mmfgm.files import write_file

from .curves import curves_png, group_scalars, over_nfe
from .data import Run, read_quickstart, read_run
from .page import page, quickstart_section, run_section


def write_report(
    work_dir: str,
    out: str | None = None,
    base: str | None = None,
    beside: Sequence[str] = (),
    pictures: int = 12,
    curves: str | None = None,
    panels: Sequence[str] | None = None,
) -> str:
    """Write the report of a run, or of a quickstart; returns its path.

    Args:
        work_dir (str): Of a training, or the folder of a quickstart.
        out (str, optional): The HTML file. Defaults to ``report.html`` in the work dir.
        base (str, optional): Config to compare with. Defaults to the packaged config that differs
            in the fewest values.
        beside (Sequence[str]): Work dirs whose metrics and losses are drawn in the same panels.
        pictures (int): Sample pictures of a run.
        curves (str, optional): Also draw metrics, over iterations and over network calls, and
            losses into this ``.png``.
        panels (Sequence[str], optional): Only those whose names contain one of these words, there.

    Raises:
        UsageError: If the folder is no work dir, or a file in it is broken.
    """
    if pictures < 1:
        raise UsageError(f'--pictures must be at least 1, but is {pictures}')
    if panels and not curves:
        raise UsageError(
            '--panels chooses what --curves FILE.png draws; add --curves, or leave --panels out'
        )
    quickstart = osp.join(work_dir, 'metrics.json')
    stages = {
        'Teacher': osp.join(work_dir, 'teacher'),
        'Generator': osp.join(work_dir, 'fgm'),
    }
    if osp.isfile(quickstart) and is_work_dir(stages['Generator']):
        # a released teacher was not trained there
        runs = {name: read_run(folder) for name, folder in stages.items() if is_work_dir(folder)}
        sections = {'Result': quickstart_section(work_dir, *read_quickstart(quickstart))}
        of = osp.abspath(work_dir)
    else:
        runs = {'Run': read_run(work_dir)}
        sections = {}
        of = runs['Run'].name
    packaged = (base, read_config(base)) if base else None
    others = [read_run(folder) for folder in beside]
    sections.update(
        {name: run_section(run, packaged, pictures, others) for name, run in runs.items()}
    )
    last = list(runs.values())[-1]
    title = f'mmfgm: {osp.basename(of)}'
    out = out or osp.join(work_dir, 'report.html')
    write_file(out, page(title, _about(runs), sections).encode())
    if curves:
        groups = group_scalars(last, others)
        drawn = {
            **groups.get('Metrics', {}),
            **over_nfe(last, others),
            **groups.get('Losses', {}),
        }
        chosen = {
            name: series
            for name, series in drawn.items()
            if not panels or any(word in name for word in panels)
        }
        if not chosen:
            raise UsageError(f'no panel has one of {panels} in its name; there are {list(drawn)}')
        write_file(curves, curves_png(chosen))
    print(f'{out}: {osp.getsize(out) / 2**20:.1f} MB; open it in any browser')
    return out


def _about(runs: dict[str, Run]) -> str:
    return '; '.join(
        f'{name.lower()}: {run.cfg.model.type}, {run.last_iteration} iterations'
        for name, run in runs.items()
    )
