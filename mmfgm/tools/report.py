# Copyright (c) mmfgm authors.
"""Write a run into one HTML file: curves, samples, results, throughput, config, environment."""

import argparse
import os.path as osp
from collections.abc import Sequence

from mmfgm.apis.report_curves import curves_png, group_scalars
from mmfgm.apis.report_data import Run, is_work_dir, read_json, read_run
from mmfgm.apis.report_page import page, quickstart_section, run_section
from mmfgm.errors import UsageError
from mmfgm.files import write_file

from .cli import CONFIG_HELP, read_config, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', help='work dir of a training, or the folder of a quickstart')
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='the HTML file to write, or to replace (default: WORK_DIR/report.html)',
    )
    parser.add_argument(
        '--base',
        metavar='CONFIG',
        help=(
            f'show what differs from this config: {CONFIG_HELP} (default: the '
            'packaged config that differs in the fewest values)'
        ),
    )
    parser.add_argument(
        '--beside',
        nargs='+',
        default=[],
        metavar='WORK_DIR',
        help='draw metrics and losses of these runs in the same panels',
    )
    parser.add_argument(
        '--pictures',
        type=int,
        default=12,
        metavar='N',
        help='sample pictures of a run (default: 12)',
    )
    parser.add_argument(
        '--curves', metavar='FILE.png', help='also draw metrics and losses into one picture'
    )
    parser.add_argument(
        '--panels',
        nargs='+',
        metavar='WORD',
        help='only those whose names contain one of these words, in that picture',
    )
    return parser.parse_args(argv)


def report(argv: Sequence[str] | None = None) -> str:
    """Write the report of a command line; returns its path."""
    args = parse_args(argv)
    if args.pictures < 1:
        raise UsageError(f'--pictures must be at least 1, but is {args.pictures}')
    if args.panels and not args.curves:
        raise UsageError(
            '--panels chooses what --curves FILE.png draws; add --curves, or leave --panels out'
        )
    quickstart = osp.join(args.work_dir, 'metrics.json')
    stages = {
        'Teacher': osp.join(args.work_dir, 'teacher'),
        'Generator': osp.join(args.work_dir, 'fgm'),
    }
    if osp.isfile(quickstart) and all(map(is_work_dir, stages.values())):
        runs = {name: read_run(folder) for name, folder in stages.items()}
        sections = {'Result': quickstart_section(args.work_dir, read_json(quickstart))}
    else:
        runs, sections = {'Run': read_run(args.work_dir)}, {}
    base = (args.base, read_config(args.base)) if args.base else None
    beside = [read_run(folder) for folder in args.beside]
    sections.update(
        {name: run_section(run, base, args.pictures, beside) for name, run in runs.items()}
    )
    last = list(runs.values())[-1]
    title = (
        f'mmfgm: {osp.basename(osp.abspath(args.work_dir))}'
        if len(runs) > 1
        else f'mmfgm: {last.name}'
    )
    out = args.out or osp.join(args.work_dir, 'report.html')
    write_file(out, page(title, _about(runs), sections).encode())
    if args.curves:
        groups = group_scalars(last, beside)
        panels = {**groups.get('Metrics', {}), **groups.get('Losses', {})}
        chosen = {
            name: curves
            for name, curves in panels.items()
            if not args.panels or any(w in name for w in args.panels)
        }
        if not chosen:
            raise UsageError(
                f'no panel has one of {args.panels} in its name; there are {list(panels)}'
            )
        write_file(args.curves, curves_png(chosen))
    print(f'{out}: {osp.getsize(out) / 2**20:.1f} MB; open it in any browser')
    return out


def _about(runs: dict[str, Run]) -> str:
    return '; '.join(
        f'{name.lower()}: {run.cfg.model.type}, {run.last_iteration} iterations'
        for name, run in runs.items()
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(report, argv)


if __name__ == '__main__':
    main()
