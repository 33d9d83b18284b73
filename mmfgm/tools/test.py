# Copyright (c) mmfgm authors.
"""Measure a teacher and a generator, at any list of NFE, beside each other."""

import argparse
from collections.abc import Sequence

from .cli import RUN_HELP, add_common_arguments, load_config, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, RUN_HELP)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help=(
            'checkpoint of the config, or a work dir, meaning its last one; '
            'not needed for its teacher alone'
        ),
    )
    parser.add_argument(
        '--network',
        nargs='+',
        default=None,
        metavar='NAME',
        help=(
            'networks to test, e.g. teacher generator_ema (default: the one each evaluation names)'
        ),
    )
    parser.add_argument(
        '--nfe',
        nargs='+',
        type=int,
        default=[50],
        metavar='N',
        help=(
            'network evaluations (default: 50); a generator takes those that it can, and always as'
            ' many as it has times'
        ),
    )
    parser.add_argument(
        '--solver', default='euler', help='ODE solver: euler or heun (default: euler)'
    )
    parser.add_argument(
        '--guidance',
        type=float,
        default=None,
        metavar='SCALE',
        help='classifier-free guidance of networks that are integrated (default: none)',
    )
    parser.add_argument(
        '--shift',
        type=float,
        default=None,
        help=(
            "time grid of networks that are integrated, as diffusers' scheduler of this shift makes"
            ' it (SD3: 3)'
        ),
    )
    parser.add_argument(
        '--spacing',
        default='uniform',
        help=(
            "of the times of networks that are integrated: uniform; edm, that of EDM's sampler;"
            " or pipeline, that of the family's own pipeline, its guidance included"
        ),
    )
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='of generators of few steps: no fresh noise between calls',
    )
    parser.add_argument(
        '--evaluation',
        nargs='+',
        default=None,
        metavar='NAME',
        help="which of the config's evaluations (default: all)",
    )
    parser.add_argument(
        '--out',
        default=None,
        metavar='DIR',
        help='where metrics.json and the plots go (default: WORK_DIR/test)',
    )
    return parser.parse_args(argv)


def test(argv: Sequence[str] | None = None) -> dict[str, dict[str, dict[int, float]]]:
    """Measure as the command line says; prints and returns the table."""
    args = parse_args(argv)
    cfg = load_config(args)
    from mmfgm.apis import measure, weights_of

    return measure(
        cfg,
        weights_of(args.config, args.checkpoint),
        args.network,
        args.nfe,
        args.solver,
        args.guidance,
        args.shift,
        args.spacing,
        args.deterministic,
        args.evaluation,
        args.out,
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(test, argv)


if __name__ == '__main__':
    main()
