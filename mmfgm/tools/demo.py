# Copyright (c) mmfgm authors.
"""A page to try a generator in the browser: prompt or class, seed, one-step picture, the teacher's
beside it."""

import argparse
from collections.abc import Sequence

from mmfgm.errors import UsageError

from .cli import RUN_HELP, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config', help=f'{RUN_HELP}; or the folder of an export, which needs no WEIGHTS'
    )
    parser.add_argument(
        'weights',
        nargs='?',
        help='checkpoint, work dir, or .safetensors file of tools/merge_checkpoint.py',
    )
    parser.add_argument('--device', help='default: the GPU, if there is one')
    parser.add_argument(
        '--precision', choices=['fp32', 'bf16', 'auto'], default='fp32', help='default: %(default)s'
    )
    parser.add_argument(
        '--teacher',
        metavar='CHECKPOINT',
        help="the teacher's checkpoint, or none to show no teacher (default: the config's)",
    )
    parser.add_argument(
        '--gallery',
        type=int,
        default=8,
        metavar='N',
        help='the gallery shows the seeds 0 to N-1 (default: 8)',
    )
    parser.add_argument(
        '--server-name',
        default='127.0.0.1',
        help='address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)',
    )
    parser.add_argument('--port', type=int, default=7860, help='default: %(default)s')
    parser.add_argument(
        '--auth-file',
        metavar='FILE',
        help='a line USER:PASSWORD for each who may open the page; without it, the environment'
        ' variable MMFGM_DEMO_AUTH (an argument would show in the list of processes)',
    )
    parser.add_argument(
        '--share',
        action='store_true',
        help="a public address through gradio's tunnel; needs a password",
    )
    parser.add_argument(
        '--share-without-password', action='store_true', help='--share for everybody'
    )
    return parser.parse_args(argv)


def demo(argv: Sequence[str] | None = None) -> None:
    """Serve the page of a command line until it is interrupted."""
    args = parse_args(argv)
    if args.gallery < 1 or not 0 < args.port < 65536:
        raise UsageError(
            f'--gallery must be at least 1 and --port in [1, 65535], but they are {args.gallery}'
            f' and {args.port}'
        )
    from mmfgm.apis import serve

    serve(
        args.config,
        args.weights,
        args.device,
        args.precision,
        args.teacher,
        args.gallery,
        args.server_name,
        args.port,
        args.auth_file,
        args.share or args.share_without_password,
        args.share_without_password,
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(demo, argv)


if __name__ == '__main__':
    main()
