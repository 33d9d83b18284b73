# Copyright (c) mmfgm authors.
"""Show what a training gets to see: the first items of its loader after all transforms, with their
captions or labels, and beside them what a generator makes for the same ones."""

import argparse
import os.path as osp
from collections.abc import Sequence

from mmfgm.errors import UsageError

from .cli import RUN_HELP, add_config_options, config_options, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help=RUN_HELP)
    parser.add_argument('weights', nargs='?', help='training checkpoint or work dir of a generator')
    parser.add_argument('--num', type=int, default=16, metavar='N', help='items (default: 16)')
    parser.add_argument('--out', required=True, metavar='FILE.png', help='the picture to write')
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    add_config_options(parser)
    return parser.parse_args(argv)


def browse_dataset(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    args = parse_args(argv)
    if not args.out.endswith('.png'):
        raise UsageError(f'--out must be a .png file, but is {args.out!r}; rename it')
    if osp.exists(args.out) and not args.force:
        raise UsageError(f'{args.out!r} exists; overwrite it with --force')
    import tempfile
    from io import BytesIO

    from PIL import Image

    from mmfgm.apis import browse, read_config, weights_of
    from mmfgm.files import write_file

    cfg = read_config(args.config, config_options(args.cfg_options))
    cfg.launcher = 'none'
    # what a runner writes there is of no use
    with tempfile.TemporaryDirectory(prefix='mmfgm_browse_') as folder:
        cfg.work_dir = folder
        picture = browse(cfg, args.num, weights_of(args.config, args.weights))
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, format='png')
    write_file(args.out, buffer.getvalue())
    print(f'{args.out}: {args.num} items, {picture.shape[1]}x{picture.shape[0]} pixels')


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(browse_dataset, argv)


if __name__ == '__main__':
    main()
