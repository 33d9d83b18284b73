# Copyright (c) mmfgm authors.
"""Draw pairs (eps, x_0) that a teacher's ODE connects, for ReFlow and its distillation.

OUT becomes a cache that the data set Couplings reads. Noise and label of a pair are functions of
its number, so that neither the number of processes nor a restart changes a byte; a run that is
killed goes on where it stopped. A pair of 3x32x32 takes 12.3 kB in fp16. Several processes share
the work: torchrun --nproc_per_node=8 tools/draw_couplings.py ... --launcher pytorch.
"""

import argparse
from collections.abc import Sequence

from .cli import CONFIG_HELP, add_config_options, add_launcher, config_options, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help=f'of the teacher: {CONFIG_HELP}')
    parser.add_argument('checkpoint', help="the teacher's checkpoint, or its work dir")
    parser.add_argument(
        'out', help='the cache, a folder; one that an earlier run began is taken up'
    )
    parser.add_argument('--num-pairs', type=int, required=True, metavar='N', help='pairs to draw')
    parser.add_argument(
        '--network', metavar='NAME', help='of the checkpoint (default: its first average)'
    )
    parser.add_argument('--nfe', type=int, default=100, help='network evaluations (default: 100)')
    parser.add_argument('--solver', default='euler', help='euler or heun (default: euler)')
    parser.add_argument(
        '--shift', type=float, help="time grid of diffusers' scheduler (default: evenly spaced)"
    )
    parser.add_argument(
        '--spacing',
        default='uniform',
        help=(
            "of the times: uniform; edm, that of EDM's sampler; pipeline, that of the family's own,"
            ' guidance included (default: uniform)'
        ),
    )
    parser.add_argument(
        '--guidance',
        type=float,
        metavar='SCALE',
        help='classifier-free guidance (default: none)',
    )
    parser.add_argument(
        '--seed',
        type=int,
        default=1,
        help='selects the noise; evaluations use 0 (default: 1)',
    )
    parser.add_argument('--batch-size', type=int, default=1000, help='per process (default: 1000)')
    parser.add_argument(
        '--shard-size', type=int, default=10000, help='pairs per file (default: 10000)'
    )
    parser.add_argument(
        '--dtype',
        choices=['fp16', 'fp32'],
        default='fp16',
        help='of the stored values (default: fp16)',
    )
    parser.add_argument(
        '--precision',
        choices=['fp32', 'bf16'],
        default='fp32',
        help='of the network (default: fp32)',
    )
    add_config_options(parser)
    add_launcher(parser)
    return parser.parse_args(argv)


def draw_couplings(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    args = parse_args(argv)
    from mmfgm import apis
    from mmfgm.caches import CacheOptions
    from mmfgm.processes import connect

    cfg = apis.read_config(args.config, config_options(args.cfg_options))
    options = CacheOptions(args.dtype, args.batch_size, args.shard_size)
    connect(args.launcher, args.local_rank)
    apis.draw_couplings(
        cfg,
        args.checkpoint,
        args.out,
        args.num_pairs,
        args.network,
        args.seed,
        args.precision,
        options,
        nfe=args.nfe,
        solver=args.solver,
        shift=args.shift,
        spacing=args.spacing,
        guidance=args.guidance,
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(draw_couplings, argv)


if __name__ == '__main__':
    main()
