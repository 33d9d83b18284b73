# Copyright (c) mmfgm authors.
"""Encode prompts with a model's own text encoders, once, for training without them.

PROMPTS is a .txt (a prompt per line), .jsonl, .csv or .parquet file. OUT gets shards of embeddings,
as diffusers' encode_prompt computes them, and a manifest with the encoders' identity and each
shard's checksum. A killed run goes on where it stopped, with the same result. Several processes
share the work: torchrun ... --launcher pytorch.

A prompt of SD3 (77 CLIP tokens of 2,048 channels, 256 T5 tokens of 4,096, 2,048 pooled) takes 4.83
MB in fp32, 2.42 in bf16. --drop-padding leaves out T5's padding (0.57 MB in bf16 for a prompt of 30
T5 tokens), --drop-padding all CLIP's too (0.35 MB if it has 25 of CLIP's): 2 million prompts take
4.8, 1.1 or 0.7 TB. That changes the conditioning slightly: the transformer of diffusers' pipeline
attends to the padding tokens' embeddings, which are zero after dropping. A prompt may have
--max-length T5 tokens; CLIP sees the first 77 of its own, as in diffusers.
"""

import argparse
from collections.abc import Sequence

from .caching import add_caching_arguments, encoder_options, start
from .cli import run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('prompts', help='.txt, .jsonl, .csv or .parquet')
    parser.add_argument(
        '--column', default='prompt', help='of a .jsonl, .csv or .parquet (default: prompt)'
    )
    add_caching_arguments(parser)
    return parser.parse_args(argv)


def cache_prompts(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    args = parse_args(argv)
    from mmfgm import caches

    options = start(args)
    caches.cache_prompts(
        args.prompts, args.out, args.model, args.column, options, **encoder_options(args)
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(cache_prompts, argv)


if __name__ == '__main__':
    main()
