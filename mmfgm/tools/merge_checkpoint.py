# Copyright (c) mmfgm authors.
"""Turn one network of a checkpoint, sharded or not, into a single safetensors file."""

import argparse
import os.path as osp
from collections.abc import Sequence

from mmfgm.errors import UsageError
from mmfgm.files import write_file

from .cli import run_tool

DTYPES = dict(fp32='float32', bf16='bfloat16', fp16='float16')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'checkpoint',
        help='a .pth file, a sharded checkpoint, or a work dir, meaning its last checkpoint',
    )
    parser.add_argument('out', help='the .safetensors file to write')
    parser.add_argument(
        '--network', default='generator_ema', help='which network (default: generator_ema)'
    )
    parser.add_argument(
        '--dtype',
        choices=list(DTYPES),
        default='fp32',
        help='of the written tensors (default: fp32)',
    )
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    return parser.parse_args(argv)


def merge(argv: Sequence[str] | None = None) -> None:
    """Merge as the command line says; the file appears only when it is complete."""
    args = parse_args(argv)
    if not args.out.endswith('.safetensors'):
        raise UsageError(f'OUT must be a .safetensors file, but is {args.out!r}')
    if osp.exists(args.out) and not args.force:
        raise UsageError(f'{args.out!r} exists; overwrite it with --force')
    import torch
    from safetensors.torch import save

    from mmfgm.models import check_finite, read_state_dict, safetensors_metadata
    from mmfgm.processes import is_finite

    dtype = getattr(torch, DTYPES[args.dtype])
    state = read_state_dict(args.checkpoint, network=args.network)
    check_finite(state, args.checkpoint)
    tensors = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()
    }
    large = [key for key, value in tensors.items() if not is_finite(value)]
    if large:
        raise UsageError(
            f'{large[0]!r} of {args.checkpoint!r} holds numbers too large for {args.dtype}; use'
            ' --dtype bf16 or fp32'
        )
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    write_file(args.out, save(tensors, safetensors_metadata(tensors, network=args.network)))
    print(
        f'{args.out}: {args.network}, {len(tensors)} tensors,'
        f' {sum(value.numel() for value in tensors.values()):,} numbers'
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(merge, argv)


if __name__ == '__main__':
    main()
