# Copyright (c) mmfgm authors.
"""Rehearse a training: run one iteration of a config at full size on tensors without values, as
the first of several pretended processes.

Needs no GPU, data, weights or network. Prints the arithmetic, memory and communication of each
phase, and with --gpu the time to the end of the schedule and whether it fits. What a run would
stumble over in shapes, types, sharding or freezing is found and named.
"""

import argparse
import json
import logging
from collections.abc import Sequence

from mmfgm.errors import EXIT_DOES_NOT_FIT, UsageError

from .cli import CONFIG_HELP, add_config_options, load_config, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument(
        '--gpus', type=int, default=1, help='GPUs of the run, one process each (default: 1)'
    )
    parser.add_argument('--gpu', metavar='NAME', help='which GPU, such as H100-80GB')
    parser.add_argument(
        '--per-machine',
        type=int,
        default=8,
        metavar='N',
        help='GPUs of a machine, which share its fast link (default: 8)',
    )
    parser.add_argument(
        '--total-batch',
        type=int,
        help='samples of an update on all GPUs; sets accumulation, and the batch size where one'
        ' micro-batch is too much (default: what the config makes)',
    )
    parser.add_argument('--json', metavar='FILE', help='write the numbers there too')
    parser.add_argument(
        '--markdown',
        action='store_true',
        help='print one line of the table in docs/scale.md instead of the report',
    )
    add_config_options(parser)
    parser.set_defaults(launcher='none', work_dir=None, local_rank=0)
    return parser.parse_args(argv)


def share_batch(total: int, gpus: int, batch_size: int) -> tuple[int, int]:
    """Batch size and accumulation by which ``gpus`` make an update of ``total`` samples.

    Raises:
        UsageError: If they cannot.
    """
    if total < gpus:
        raise UsageError(
            f'expected --gpus to be at most the --total-batch of {total} samples, found {gpus}:'
            ' each GPU takes at least one; use fewer'
        )
    each, rest = divmod(total, gpus)
    size = min(batch_size, each)
    if rest or each % size:
        raise UsageError(
            f'expected --total-batch to be shared by {gpus} GPUs in micro-batches of {size}, found'
            f' {total}; choose a multiple of {gpus * size}, or another'
            ' train_dataloader.batch_size'
        )
    return size, each // size


def rehearse_tool(argv: Sequence[str] | None = None) -> None:
    """Rehearse as the command line says; exits with 1 if it does not fit the GPU."""
    args = parse_args(argv)
    cfg = load_config(args)
    from mmfgm.apis.rehearsal import gpu_named, markdown_row, rehearse, report
    from mmfgm.engine import check_config

    if args.gpu is not None:
        gpu_named(args.gpu)
    check_config(cfg)
    if args.total_batch is not None:
        size, times = share_batch(args.total_batch, args.gpus, cfg.train_dataloader.batch_size)
        cfg.train_dataloader.batch_size = size
        cfg.train_cfg.accumulation = times
    # errors are told in our words, not by torch's log too
    logging.getLogger('torch._subclasses.fake_tensor').setLevel(logging.CRITICAL)
    found = rehearse(cfg, args.gpus, args.gpu, args.per_machine)
    print(markdown_row(args.config, found) if args.markdown else f'{args.config}: {report(found)}')
    if args.json:
        from mmfgm.files import whole_file

        with whole_file(args.json) as path, open(path, 'w') as f:
            json.dump(dict(config=args.config, **found.as_dict()), f, indent=1)
    if found.fits is False:
        raise SystemExit(EXIT_DOES_NOT_FIT)


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(rehearse_tool, argv)


if __name__ == '__main__':
    main()
