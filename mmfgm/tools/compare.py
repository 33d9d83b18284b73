# Copyright (c) mmfgm authors.
"""Train several configs under the same seeds and write a table and curves. Started again, it
goes on."""

import argparse
from collections.abc import Sequence

from .cli import CONFIG_HELP, add_config_options, config_options, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help=CONFIG_HELP)
    parser.add_argument(
        '--work-dir',
        default='work_dirs/compare',
        help='gets results.json, table.md, curves.png and the runs (default: work_dirs/compare)',
    )
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0, 1], help='seeds of the runs (default: 0 1)'
    )
    parser.add_argument(
        '--metric',
        metavar='EVALUATION/METRIC',
        help='of the table (default: the one by which the best checkpoint is kept)',
    )
    add_config_options(parser, 'override values of every config, e.g. train_cfg.max_iters=600')
    return parser.parse_args(argv)


def compare(argv: Sequence[str] | None = None) -> str:
    """Run the comparison of a command line; returns the folder."""
    args = parse_args(argv)
    from mmfgm.apis import compare as run

    run(args.configs, args.work_dir, args.seeds, args.metric, config_options(args.cfg_options))
    return args.work_dir


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(compare, argv)


if __name__ == '__main__':
    main()
