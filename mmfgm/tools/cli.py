# Copyright (c) mmfgm authors.
"""What the commands share: arguments, configs, and errors that fit on one screen.

Nothing is imported here that takes long: ``--help`` and a misspelt argument answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import os.path as osp
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmfgm.errors import EXIT_NON_FINITE, EXIT_USAGE, NonFiniteError, UsageError

if TYPE_CHECKING:
    from mmengine.config import Config

CONFIG_HELP = 'config file, or mmfgm::PATH for one that comes with mmfgm'
RUN_HELP = (
    f'{CONFIG_HELP}; or the work dir of a run, which stands for its config and its last checkpoint'
)


def add_config_options(
    parser: argparse.ArgumentParser, help: str = 'override config values'
) -> None:
    """``--cfg-options KEY=VALUE ...``; :func:`config_options` reads them."""
    parser.add_argument('--cfg-options', nargs='+', action='extend', metavar='KEY=VALUE', help=help)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """What torchrun, Slurm and MPI need."""
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_common_arguments(parser: argparse.ArgumentParser, config_help: str = CONFIG_HELP) -> None:
    """The arguments every OpenMMLab tool has."""
    parser.add_argument('config', help=config_help)
    parser.add_argument(
        '--work-dir',
        help='where logs and checkpoints go (default: work_dirs/FOLDER/NAME of the config)',
    )
    add_config_options(parser, 'override config values, e.g. train_cfg.max_iters=100')
    add_launcher(parser)


def config_options(texts: Sequence[str] | None) -> dict[str, Any]:
    """The values of ``--cfg-options``, as MMEngine's ``DictAction`` reads them.

    Raises:
        UsageError: If one of them is not ``KEY=VALUE``.
    """
    from mmengine.config import DictAction

    options: dict[str, Any] = {}
    for text in texts or ():
        found = argparse.Namespace()
        try:
            DictAction([], 'options')(argparse.ArgumentParser(), found, [text])
        except (ValueError, AssertionError) as e:
            raise UsageError(
                f'--cfg-options: expected KEY=VALUE, found {text!r}; write it as in'
                ' train_cfg.max_iters=100, with as many closing brackets as opening ones'
            ) from e
        options.update(found.options)
    return options


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a command line and apply what the command line says; of a work dir, the
    config of its run, whose results go there too.

    Raises:
        UsageError: If there is no such file, it cannot be parsed, or an option does not fit it.
    """
    from mmfgm.apis import config_path, read_config

    cfg = read_config(args.config, config_options(args.cfg_options))
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        folder, name = osp.split(osp.splitext(osp.abspath(config_path(args.config)))[0])
        cfg.work_dir = osp.join('work_dirs', osp.basename(folder), name)
    return cfg


def run_tool(
    main: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None = None
) -> None:
    """Run a tool; mistakes of the user end in a message and exit code 2, not in a traceback.

    A run stopped by a non-finite value exits with 3, one stopped by SIGTERM with 75. The traceback
    of any error goes to the run's log file, where there is one, and to the terminal with
    ``MMFGM_TRACEBACK=1``.
    """
    code: Any = 0
    try:
        main(argv)
    except (UsageError, NonFiniteError) as e:
        code = EXIT_NON_FINITE if isinstance(e, NonFiniteError) else EXIT_USAGE
        _log(traceback.format_exc())
        if os.environ.get('MMFGM_TRACEBACK', '0') not in ('', '0'):
            traceback.print_exc()
        print(f'\nerror: {e}', file=sys.stderr, flush=True)
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        _log(traceback.format_exc())
        raise
    # not in a finally: after another error the peers may be waiting in a collective
    dist = sys.modules.get('torch.distributed')
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
        # a thread of the backend that outlives the interpreter aborts the process: leave without
        # the teardown
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else EXIT_USAGE)
    if code:
        sys.exit(code)


def _log(text: str) -> None:
    """Write to the log file of the run, not to the terminal."""
    if 'mmengine.logging' not in sys.modules:
        return
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
