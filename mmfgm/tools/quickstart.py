# Copyright (c) mmfgm authors.
"""A one-step generator on a CPU, from its data to a picture, a table and an export.

digits trains a teacher on scikit-learn's digits and distils it; shapes turns captions into pictures
and distils the teacher that comes with mmfgm. Run again, it reuses what is finished.
"""

import argparse
from collections.abc import Sequence

from .cli import run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'problem', nargs='?', default='digits', help='digits or shapes (default: %(default)s)'
    )
    parser.add_argument('--work-dir', help='default: work_dirs/quickstart/PROBLEM')
    parser.add_argument(
        '--pretrain-iters', type=int, default=None, help="default: the teacher config's"
    )
    parser.add_argument('--distill-iters', type=int, default=None, help="default: the FGM config's")
    parser.add_argument(
        '--num-samples',
        type=int,
        default=None,
        help="samples per measurement (default: the FGM config's)",
    )
    return parser.parse_args(argv)


def quickstart(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Run all stages as the command line says."""
    args = parse_args(argv)
    from mmfgm.apis import run_quickstart as run

    return run(
        args.problem, args.work_dir, args.pretrain_iters, args.distill_iters, args.num_samples
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(quickstart, argv)


if __name__ == '__main__':
    main()
