# Copyright (c) mmfgm authors.
"""Compare our ODE with the stock pipeline of a model, on its own weights: which family it is of,
and whether the latents after each step are equal. Exit code 0 if they are, 1 if not."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .cli import run_tool

if TYPE_CHECKING:
    from mmfgm.apis import TeacherCheck


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', help="folder in diffusers' format, or id on the hub")
    parser.add_argument('--prompts', nargs='+', help='one image each (default: two short ones)')
    parser.add_argument('--steps', type=int, default=8, help="of Euler's method (default: 8)")
    parser.add_argument(
        '--guidance', type=float, help="of two passes, in our scale (default: the pipeline's own)"
    )
    parser.add_argument(
        '--latent-size', type=int, help="height and width of latents (default: the network's)"
    )
    parser.add_argument(
        '--max-length', type=int, help="tokens of a prompt (default: the pipeline's)"
    )
    parser.add_argument(
        '--dtype',
        choices=['float32', 'bfloat16', 'float16'],
        default='float32',
        help='of the weights (default: float32)',
    )
    parser.add_argument('--device', default='cpu', help='default: cpu')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-3,
        help='differences up to it are none, in standard deviations of the latents (default: 1e-3)',
    )
    return parser.parse_args(argv)


def check(argv: Sequence[str] | None = None) -> 'TeacherCheck':
    """Compare as the command line says, and print what was found."""
    args = vars(parse_args(argv))
    from mmfgm.apis import building, check_teacher
    from mmfgm.errors import UsageError

    if args['steps'] < 1:
        raise UsageError(f'--steps must be at least 1, but is {args["steps"]}')
    given = {name: value for name, value in args.items() if value is not None}
    found = building(lambda: check_teacher(**given))
    print(found)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(lambda argv: sys.exit(0 if check(argv).equal else 1), argv)


if __name__ == '__main__':
    main()
