# Copyright (c) mmfgm authors.
"""What the command-line tools share: configs, launchers, and errors that fit on one screen."""

import argparse
import logging
import os
import os.path as osp
import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist
from mmengine.config import Config, DictAction

from mmfgm.apis.config import config_path, read_config
from mmfgm.errors import EXIT_NON_FINITE, EXIT_USAGE, NonFiniteError, UsageError

CONFIG_HELP = 'config file, or mmfgm::PATH for one that comes with mmfgm'


def add_common_arguments(parser: argparse.ArgumentParser, config_help: str = CONFIG_HELP) -> None:
    """The arguments every OpenMMLab tool has."""
    parser.add_argument('config', help=config_help)
    parser.add_argument(
        '--work-dir',
        help='where logs and checkpoints go (default: work_dirs/FOLDER/NAME of the config)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override config values, e.g. train_cfg.max_iters=100',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a command line and apply what the command line says.

    Raises:
        UsageError: If there is no such file, it cannot be parsed, or an option does not fit it.
    """
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        folder, name = osp.split(osp.splitext(osp.abspath(config_path(args.config)))[0])
        cfg.work_dir = osp.join('work_dirs', osp.basename(folder), name)
    return cfg


def run_tool(
    main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None
) -> None:
    """Run a tool; mistakes of the user end in a message and exit code 2, not in a traceback.

    A run stopped by a non-finite value exits with 3, one stopped by SIGTERM with 75.
    """
    code = 0
    try:
        main(argv)
    except (UsageError, NonFiniteError) as e:
        code = EXIT_NON_FINITE if isinstance(e, NonFiniteError) else EXIT_USAGE
        print(f'\nerror: {e}', file=sys.stderr, flush=True)
    except SystemExit as e:
        code = e.code or 0
    # not in a finally: after another error the peers may be waiting in a collective
    if dist.is_initialized():
        dist.destroy_process_group()
        # a thread of the backend that outlives the interpreter aborts the process: leave without
        # the teardown
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else EXIT_USAGE)
    if code:
        sys.exit(code)


def building(build: Callable):
    """Call ``build()`` and turn what a registry raises for a wrong config into a UsageError.

    An unknown type is a KeyError there, an unknown or missing argument a TypeError.
    """
    try:
        return build()
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError, OSError) as e:
        cause = e.__cause__ if isinstance(e.__cause__, UsageError) else e
        raise UsageError(f'the config cannot be built: {str(cause).strip(chr(34))}') from e
