# Copyright (c) mmfgm authors.
"""Encode prompts with Stable Diffusion 3's text encoders, once, for training without them.

PROMPTS is a .txt (a prompt per line), .jsonl, .csv or .parquet file. OUT gets shards of embeddings,
as diffusers' encode_prompt computes them, and a manifest with the encoders' identity and each
shard's checksum. A killed run goes on where it stopped, with the same result. Several processes
share the work: torchrun ... --launcher pytorch.

A prompt of SD3 (77 CLIP tokens of 2,048 channels, 256 T5 tokens of 4,096, 2,048 pooled) takes 4.83
MB in fp32, 2.42 in bf16. --drop-padding leaves out T5's padding (0.57 MB in bf16 for a prompt of 30
T5 tokens), --drop-padding all CLIP's
too (0.35 MB if it has 25 of CLIP's): 2 million prompts take 4.8, 1.1 or 0.7 TB. That changes the
    conditioning slightly:
the transformer of diffusers' pipeline attends to the padding tokens' embeddings, which are zero
after dropping.

A prompt may have --max-length T5 tokens; CLIP sees the first 77 of its own, as in diffusers.
"""

import argparse
import csv
import hashlib
import json
import os.path as osp
from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process

from mmfgm.caches import identity_of
from mmfgm.errors import UsageError
from mmfgm.models.families import find
from mmfgm.processes import on_main

from .caching import (
    DTYPES,
    ShardWriter,
    add_caching_arguments,
    encoder_options,
    keep_good,
    run_job,
    start,
)
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


def read_prompts(path: str, column: str) -> tuple[list[str], list[Any]]:
    """Where each prompt is (``'line 3'``), and what is there, which may be no prompt.

    Raises:
        UsageError: If the file is missing, of another kind, damaged or without the column.
    """
    extension = osp.splitext(path)[1].lower()
    readers = {
        '.txt': _read_txt,
        '.jsonl': _read_jsonl,
        '.csv': _read_csv,
        '.parquet': _read_parquet,
    }
    if extension not in readers:
        raise UsageError(
            f'prompts come from {", ".join(readers)} files, but {path!r} is none of them'
        )
    try:
        places, prompts = zip(*readers[extension](path, column))
    except OSError as e:
        raise UsageError(f'{path!r} cannot be read: {e}') from e
    except UnicodeDecodeError as e:
        raise UsageError(f'{path!r} is not UTF-8 text ({e}); convert it') from e
    except ValueError as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(f'{path!r} holds no prompts') from e
    return list(places), list(prompts)


def _read_txt(path, column):
    with open(path, encoding='utf-8-sig', newline=None) as f:
        return [(f'line {number}', line.rstrip('\n')) for number, line in enumerate(f, 1)]


def _read_jsonl(path, column):
    items = []
    with open(path, encoding='utf-8-sig') as f:
        for number, line in enumerate(f, 1):
            try:
                items.append((f'line {number}', json.loads(line)[column]))
            except (ValueError, KeyError, TypeError) as e:
                raise UsageError(
                    f'{path!r}, line {number}: expected is an object with {column!r}, found '
                    f'{line.strip()[:80]!r} ({e!r}); correct it, or name the field with --column'
                ) from e
    return items


def _read_csv(path, column):
    with open(path, encoding='utf-8-sig', newline='') as f:
        reader = csv.DictReader(f)
        try:
            if column not in (reader.fieldnames or ()):
                raise UsageError(
                    f'{path!r} has no column {column!r}, but {reader.fieldnames}; name one with'
                    ' --column'
                )
            # a quoted prompt may have several lines; the number is of its last
            return [(f'line {reader.line_num}', row[column]) for row in reader]
        except csv.Error as e:
            raise UsageError(f'{path!r}, line {reader.line_num}: {e}; correct it') from e


def _read_parquet(path, column):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as e:
        raise UsageError(
            f'reading {path!r} needs pyarrow, which does not import ({e}): pip install pyarrow, or'
            ' convert the file to .jsonl'
        ) from e
    try:
        names = parquet.read_schema(path).names
        if column not in names:
            raise UsageError(
                f'{path!r} has no column {column!r}, but {names}; name one with --column'
            )
        prompts = parquet.read_table(path, columns=[column])[column].to_pylist()
        return [(f'row {row}', prompt) for row, prompt in enumerate(prompts)]
    except ArrowException as e:
        raise UsageError(f'{path!r} cannot be read as parquet: {e}') from e


def cache_prompts(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    args = parse_args(argv)
    device = start(args)
    places, prompts = on_main(lambda: read_prompts(args.prompts, args.column))
    encoder = find(args.model).encoder(args.model, **encoder_options(args)).to(device)
    identity = on_main(lambda: identity_of(encoder))
    # all are looked at before the first is encoded, which may be hours earlier
    bad = on_main(lambda: encoder.bad(prompts))
    skipped = on_main(lambda: keep_good(places, bad, args.on_bad))
    prompts = [prompt for i, prompt in enumerate(prompts) if i not in bad]
    digest = hashlib.sha256('\n'.join(map(json.dumps, prompts)).encode()).hexdigest()
    settings = dict(
        encoder.settings,
        dtype=DTYPES[args.dtype],
        batch_size=args.batch_size,
        shard_size=args.shard_size,
    )
    job = dict(
        kind='prompts',
        identity=identity,
        settings=settings,
        layout=encoder.layout,
        conditions=encoder.conditions,
        source=dict(count=len(prompts), sha256=digest, skipped=skipped),
    )
    if skipped and is_main_process():
        print(f'{len(skipped)} prompts are left out; the manifest lists them', flush=True)
    run_job(
        ShardWriter(args.out, job),
        len(prompts),
        args.shard_size,
        args.batch_size,
        lambda items: (encoder.store([prompts[i] for i in items]), []),
        lambda: encoder.store(['']),
        'prompt',
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(cache_prompts, argv)


if __name__ == '__main__':
    main()
