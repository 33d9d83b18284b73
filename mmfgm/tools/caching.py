# Copyright (c) mmfgm authors.
"""The arguments that both caching commands have."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .cli import add_launcher

if TYPE_CHECKING:
    from mmfgm.caches import CacheOptions


def add_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both tools."""
    parser.add_argument(
        'out',
        help='the cache, a folder; one that an earlier run began is taken up where it stopped',
    )
    parser.add_argument(
        '--model',
        required=True,
        help="a pipeline's folder in diffusers' format, or its id on the hub",
    )
    parser.add_argument('--batch-size', type=int, default=16, help='per process (default: 16)')
    parser.add_argument(
        '--dtype',
        choices=['bf16', 'fp32'],
        default='bf16',
        help='of the stored values (default: bf16)',
    )
    parser.add_argument(
        '--shard-size', type=int, default=1000, help='items per file (default: 1000)'
    )
    parser.add_argument(
        '--max-length', type=int, help="tokens of a prompt (default: the model's own; T5: 256)"
    )
    parser.add_argument(
        '--drop-padding',
        choices=['none', 't5', 'all'],
        nargs='?',
        const='t5',
        help="do not store T5's padding tokens, or CLIP's neither; see above (default: none)",
    )
    parser.add_argument(
        '--without-t5',
        action='store_true',
        help='leave T5 out; its tokens are zero, as in diffusers',
    )
    parser.add_argument(
        '--on-bad',
        choices=['error', 'skip'],
        default='error',
        help=(
            'what to do about bad items; those skipped are listed in the manifest (default: error)'
        ),
    )
    add_launcher(parser)


def start(args: argparse.Namespace) -> CacheOptions:
    """Connect the processes, and return what all caches have in common."""
    from mmfgm.caches import CacheOptions
    from mmfgm.processes import connect

    options = CacheOptions(args.dtype, args.batch_size, args.shard_size, args.on_bad)
    connect(args.launcher, args.local_rank)
    return options


def encoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those for the family's encoder of prompts that were given: not every family has each."""
    options = dict(max_length=args.max_length, drop_padding=args.drop_padding)
    if args.without_t5:
        options['without_t5'] = True
    return {name: value for name, value in options.items() if value is not None}
