# Copyright (c) mmfgm authors.
"""Train a teacher (configs/reflow) or a one-step generator (configs/fgm)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .cli import add_common_arguments, load_config, run_tool

if TYPE_CHECKING:
    from mmfgm.engine import FlowRunner


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        default=None,
        metavar='CHECKPOINT',
        help='go on from CHECKPOINT, or from the last one in the work dir, if there is any',
    )
    parser.add_argument(
        '--allow-changes',
        action='store_true',
        help='resume even where the config describes another run than the checkpoint comes from',
    )
    parser.add_argument(
        '--profile',
        action='store_true',
        help=(
            'say where the time of the fifth and sixth iteration goes: a table of the ten'
            ' operations that take longest, and WORK_DIR/trace.json for chrome://tracing'
        ),
    )
    return parser.parse_args(argv)


def train(argv: Sequence[str] | None = None) -> FlowRunner:
    """Train as the command line says; returns the runner."""
    args = parse_args(argv)
    cfg = load_config(args)
    from mmfgm.apis import train as run

    return run(cfg, args.resume, args.allow_changes, args.profile)


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(train, argv)


if __name__ == '__main__':
    main()
