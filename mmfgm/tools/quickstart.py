# Copyright (c) mmfgm authors.
"""Pre-train a teacher on scikit-learn's digits, distil it, and measure both. Run again, it reuses
what is finished."""

import argparse
from collections.abc import Sequence

from .cli import run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/quickstart', help='default: %(default)s')
    parser.add_argument(
        '--pretrain-iters', type=int, default=None, help="default: the teacher config's"
    )
    parser.add_argument('--distill-iters', type=int, default=None, help="default: the FGM config's")
    parser.add_argument(
        '--num-samples',
        type=int,
        default=10000,
        help='samples per measurement (default: %(default)s)',
    )
    return parser.parse_args(argv)


def quickstart(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Run all stages as the command line says."""
    args = parse_args(argv)
    from mmfgm.apis import run_quickstart as run

    return run(args.work_dir, args.pretrain_iters, args.distill_iters, args.num_samples)


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(quickstart, argv)


if __name__ == '__main__':
    main()
