# Copyright (c) mmfgm authors.
"""Write a run into one HTML file: curves, samples, results, throughput, config, environment."""

import argparse
from collections.abc import Sequence

from .cli import CONFIG_HELP, run_tool


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
        help='draw metrics, over network calls too, and losses of these runs in the same panels',
    )
    parser.add_argument(
        '--pictures',
        type=int,
        default=12,
        metavar='N',
        help='sample pictures of a run (default: 12)',
    )
    parser.add_argument(
        '--curves',
        metavar='FILE.png',
        help='also draw metrics (over network calls too, as tools/test.py measured) and losses',
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
    from mmfgm.apis.report import write_report

    return write_report(
        args.work_dir, args.out, args.base, args.beside, args.pictures, args.curves, args.panels
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(report, argv)


if __name__ == '__main__':
    main()
