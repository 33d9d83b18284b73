# Copyright (c) mmfgm authors.
"""Train a small classifier on the data set of a config, whose features then measure samples of
it."""

import argparse
import os
import os.path as osp
from collections.abc import Sequence

from mmfgm.errors import UsageError

from .cli import add_common_arguments, load_config, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, 'a config whose train_dataloader has images with labels')
    parser.add_argument('out', help='the .safetensors file to write')
    parser.add_argument('--epochs', type=int, default=4, help='(default: 4)')
    parser.add_argument('--seed', type=int, default=0, help='(default: 0)')
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    return parser.parse_args(argv)


def run(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(argv)
    if not args.out.endswith('.safetensors'):
        raise UsageError(f'OUT must be a .safetensors file, but is {args.out!r}; rename it')
    if osp.exists(args.out) and not args.force:
        raise UsageError(f'{args.out!r} exists; overwrite it with --force')
    if args.epochs < 1:
        raise UsageError(f'--epochs must be at least 1, but is {args.epochs}')
    cfg = load_config(args)
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    from mmfgm.apis import building, train_classifier

    init_default_scope('mmfgm')
    MMLogger.get_instance('mmfgm')
    os.makedirs(osp.dirname(osp.abspath(args.out)), exist_ok=True)
    dataset = cfg.train_dataloader.dataset.to_dict()
    accuracy = building(
        lambda: train_classifier(dataset, args.out, epochs=args.epochs, seed=args.seed)
    )
    print(f'{args.out}: accuracy {accuracy:.4f}')


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(run, argv)


if __name__ == '__main__':
    main()
