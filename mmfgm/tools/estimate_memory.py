# Copyright (c) mmfgm authors.
"""Estimate the GPU memory that training a config takes, without weights, data or a GPU.

Parameters, gradients, optimizer state and averages are counted exactly, on the meta device.
Activations are what autograd keeps for the backward pass, counted in a forward pass on tensors
without values. Not counted are workspaces, temporary tensors and evaluation (its batch size and
decoder are its own); the reserve is for them.
"""

import argparse
import math
from collections.abc import Sequence

from mmfgm.errors import EXIT_DOES_NOT_FIT, UsageError

from .cli import CONFIG_HELP, add_config_options, load_config, run_tool

# GiB, as torch.cuda reports them
GPUS = {
    'T4-16GB': 14.6,
    'V100-16GB': 15.8,
    'V100-32GB': 31.7,
    'L4-24GB': 22.0,
    'A10G-24GB': 22.0,
    'RTX3090-24GB': 23.6,
    'RTX4090-24GB': 23.6,
    'A100-40GB': 39.4,
    'A100-80GB': 79.1,
    'L40S-48GB': 44.4,
    'H100-80GB': 79.1,
    'H200-141GB': 139.7,
}
CONTEXT_GIB = 1.0
RESERVE = 0.1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument(
        '--gpus', type=int, default=1, help='GPUs of the run, one process each (default: 1)'
    )
    parser.add_argument(
        '--gpu', metavar='SIZE', help=f'does it fit: GiB of one GPU, or one of {", ".join(GPUS)}'
    )
    parser.add_argument(
        '--batch-size', type=int, help='samples per GPU (default: train_dataloader.batch_size)'
    )
    add_config_options(parser)
    parser.set_defaults(launcher='none', work_dir=None, local_rank=0)
    return parser.parse_args(argv)


def gpu_gib(name: str) -> float:
    """Memory of a GPU in GiB, by its name or as a number.

    Raises:
        UsageError: If it is neither a known name nor a positive number.
    """
    try:
        size = GPUS[name] if name in GPUS else float(name)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UsageError(f'--gpu must be GiB or one of {", ".join(GPUS)}, but is {name!r}')
    return size


def estimate_memory(argv: Sequence[str] | None = None) -> None:
    """Estimate as the command line says; exits with 1 if it does not fit the GPU that was named."""
    args = parse_args(argv)
    size = None if args.gpu is None else gpu_gib(args.gpu)
    cfg = load_config(args)
    from mmfgm.apis.memory import GIB, Plan, estimate, table

    memory = estimate(cfg, args.gpus, args.batch_size)
    plan = Plan.of(cfg, args.gpus)
    print(
        f'{args.config} on {plan.gpus} GPU(s): {plan.strategy}, {plan.precision}, batch of'
        f' {memory.batch_size} per GPU\n\n{table(memory)}\n\nActivations are those of phase'
        f' {memory.phase!r}, which keeps most; gradients are those that exist at one time.'
    )
    if size is None:
        return
    usable = (size - CONTEXT_GIB) * (1 - RESERVE)
    fits = memory.total <= usable * GIB
    print(
        f'{args.gpu} has {size:.1f} GiB, of which {usable:.1f} GiB are left after {CONTEXT_GIB:.0f}'
        f' GiB for the CUDA context and {RESERVE:.0%} for workspaces and fragmentation:'
        f' {memory.total / GIB:.1f} GiB {"fit" if fits else "do NOT fit"}.'
    )
    if not fits:
        raise SystemExit(EXIT_DOES_NOT_FIT)


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(estimate_memory, argv)


if __name__ == '__main__':
    main()
