# Copyright (c) mmfgm authors.
"""Make a file of reference statistics: from a folder or .zip of images, or from the data set that a
config measures against."""

import argparse
import os
import os.path as osp
from collections.abc import Sequence
from typing import Any

from mmfgm.errors import UsageError

from .cli import add_common_arguments, load_config, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(
        parser, 'folder or .zip of images, or a config, whose evaluation names the data set'
    )
    parser.add_argument('out', help='where the statistics go, a .npz file')
    parser.add_argument(
        '--evaluation', default='fid', help="which of the config's evaluations (default: fid)"
    )
    parser.add_argument('--metric', default='fid', help='which of its metrics (default: fid)')
    parser.add_argument(
        '--weights',
        default=None,
        help='local Inception weights (default: as the config says, or downloaded)',
    )
    parser.add_argument(
        '--features',
        action='store_true',
        help='keep the features too, which KID and precision/recall compare (8 kB an image)',
    )
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    return parser.parse_args(argv)


def find_metric(cfg: Any, evaluation: str, metric: str) -> dict:
    """The config of one metric, with a reference data set.

    Raises:
        UsageError: If there is none.
    """
    entry = (cfg.get('evaluations') or {}).get(evaluation, {}).get('metrics', {}).get(metric, {})
    if not isinstance(entry.get('reference'), dict):
        raise UsageError(
            f'the config has no data set at evaluations.{evaluation}.metrics.{metric}.reference,'
            f' but {entry.get("reference")!r}; name another with --evaluation and --metric'
        )
    return entry


def fid_stats(argv: Sequence[str] | None = None) -> None:
    """Compute and save the statistics as the command line says."""
    args = parse_args(argv)
    if not args.out.endswith('.npz'):
        raise UsageError(f'OUT must be a .npz file, but is {args.out!r}')
    if osp.exists(args.out) and not args.force:
        raise UsageError(f'{args.out!r} exists; overwrite it with --force')
    os.makedirs(osp.dirname(osp.abspath(args.out)), exist_ok=True)
    if args.config.endswith('.py'):
        metric = find_metric(load_config(args), args.evaluation, args.metric)
        reference = metric['reference']
        feature = metric.get('feature', dict(type='InceptionV3'))
    else:
        reference = dict(type='ImageFolder', path=args.config, labels=False)
        feature = dict(type='InceptionV3')
    if args.weights:
        feature = {**feature, 'weights': args.weights}
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    from mmfgm.apis import building
    from mmfgm.evaluation import build_feature, load_reference, save_reference
    from mmfgm.processes import init_processes, rank_and_size

    init_default_scope('mmfgm')
    MMLogger.get_instance('mmfgm')
    init_processes(args.launcher)
    extractor = building(lambda: build_feature(feature))
    statistics = building(lambda: load_reference(reference, extractor, args.features))
    if rank_and_size()[0] == 0:
        save_reference(args.out, statistics, extractor)
        print(
            f'{args.out}: {statistics.n} samples, {len(statistics.mean)} features of'
            f' {extractor.name}'
        )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(fid_stats, argv)


if __name__ == '__main__':
    main()
