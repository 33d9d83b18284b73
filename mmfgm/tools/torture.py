# Copyright (c) mmfgm authors.
"""Kill, stop and damage runs of a config at random moments, and compare what they end with."""

import argparse
import random
import sys
import threading
import time
from collections.abc import Sequence

from .cli import run_tool

KINDS = ('worker', 'launcher', 'all', 'sigterm', 'disk', 'damage', 'clock')
# how the processes of a run are started
TRAIN = '_train'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'work_dir', help='of a run of the config; all happens in its folder torture'
    )
    parser.add_argument('--minutes', type=float, default=30, help='how long (default: 30)')
    parser.add_argument(
        '--faults', type=int, default=None, metavar='N', help='end after so many (default: no end)'
    )
    parser.add_argument('--processes', type=int, default=1, help='of a run (default: 1)')
    parser.add_argument(
        '--strategy', choices=['ddp', 'fsdp2'], help="of several processes (default: the config's)"
    )
    parser.add_argument(
        '--iterations', type=int, default=40, help='of a run, with 8 checkpoints (default: 40)'
    )
    parser.add_argument(
        '--kinds', nargs='+', choices=KINDS, default=list(KINDS), help='of faults (default: all)'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the choices (default: 0)')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override config values'
    )
    return parser.parse_args(argv)


def jump(seconds: float) -> None:
    """Let the clock jump at some moment within the next seconds, and back again, for what asks it
    in Python.

    A library that is preloaded, such as libfaketime, would also turn monotonic clocks, which no
    clock setting moves.
    """
    clock, local, shift = time.time, time.localtime, [0.0]
    own = random.Random()  # the training compares the state of the other one

    def move() -> None:
        for shift[0] in (seconds, -seconds, 0.0, seconds):
            time.sleep(own.uniform(0, 2))

    time.time = lambda: clock() + shift[0]
    time.localtime = lambda at=None: local(time.time() if at is None else at)
    threading.Thread(target=move, daemon=True).start()


def run(argv: Sequence[str] | None = None) -> None:
    """Torture as the command line says."""
    args = parse_args(argv)
    from mmfgm.apis import torture

    torture(
        args.work_dir,
        ['-m', 'mmfgm.tools.torture', TRAIN],
        args.minutes,
        args.processes,
        args.strategy,
        args.iterations,
        args.cfg_options,
        args.kinds,
        args.faults,
        args.seed,
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != [TRAIN]:
        return run_tool(run, argv)
    if float(argv[1]):
        jump(float(argv[1]))
    from .train import main as train

    return train(argv[2:])


if __name__ == '__main__':
    main()
