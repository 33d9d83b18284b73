# Copyright (c) mmfgm authors.
"""Encode images with a model's own VAE, and their captions with its text encoders, once, for
training without them; or images and their labels.

IMAGES is a folder, a .zip, or webdataset shards: a .tar or a folder of them. Every image is turned
upright as its EXIF says, made RGB, resized (bicubic, antialiased) so that its shorter side has
--resolution pixels, which enlarges smaller ones, and cut to the square in its centre: what is
outside is lost. The latents are (mean - shift_factor) * scaling_factor of the VAE's distribution,
computed in float32. A 1024-pixel image of SD3 takes 0.52 MB in bf16, a 512-pixel one 0.13 MB; for
captions see cache_prompts.py. A run that is killed goes on where it stopped. Several processes
share the work, as there.
"""

import argparse
from collections.abc import Sequence

from .caching import add_caching_arguments, encoder_options, start
from .cli import run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', help='a folder or .zip of images, a .tar or a folder of .tar')
    parser.add_argument(
        '--resolution', type=int, default=1024, help='pixels of a side (default: 1024)'
    )
    parser.add_argument(
        '--captions',
        metavar='FILE',
        help=(
            'a .jsonl of {"file_name": ..., "text": ...}, or "txt" for a '
            'KEY.txt beside each KEY.jpg, as in webdataset'
        ),
    )
    parser.add_argument(
        '--labels',
        choices=['folders', 'json'],
        help=(
            'number the classes by the folder (or .tar) at the top that an image lies in, as'
            " ImageNet has it, or by EDM's dataset.json at the top"
        ),
    )
    parser.add_argument(
        '--vae-only',
        action='store_true',
        help='--model is a VAE published alone, such as stabilityai/sd-vae-ft-ema',
    )
    parser.add_argument(
        '--workers', type=int, default=4, help='threads that decode images (default: 4)'
    )
    add_caching_arguments(parser)
    return parser.parse_args(argv)


def cache_latents(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    args = parse_args(argv)
    from mmfgm import caches

    options = start(args)
    caches.cache_latents(
        args.images,
        args.out,
        args.model,
        args.resolution,
        args.captions,
        args.workers,
        options,
        args.labels,
        args.vae_only,
        **encoder_options(args),
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(cache_latents, argv)


if __name__ == '__main__':
    main()
