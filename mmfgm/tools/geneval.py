# Copyright (c) mmfgm authors.
"""GenEval: write its prompts, score a folder of images, generate and score with a diffusers
pipeline, print results.

  prompts OUT.jsonl      the 553 prompts, for tools/cache_prompts.py or another generator
  score FOLDER           images in the reference's layout: FOLDER/00000/metadata.jsonl and
                         FOLDER/00000/samples/0000.png
  run CONFIG             generate the images of a config's pipeline (configs/geneval), then score
                         them
  summary RESULTS.jsonl  the scores of finished results, ours or the reference's

What a killed run finished is not repeated. Several processes share the work:
torchrun ... --launcher pytorch.
"""

from __future__ import annotations

import argparse
import os
import os.path as osp
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmfgm.errors import UsageError
from mmfgm.files import read_json, write_file

from .cli import (
    CONFIG_HELP,
    add_common_arguments,
    add_config_options,
    add_launcher,
    load_config,
    run_tool,
)

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmfgm.evaluation.geneval import Scorer

SCORING_CONFIG = 'mmfgm::_base_/evaluation/geneval.py'


def _add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--num-samples', type=int, default=4, help='images of each prompt (default: 4)'
    )
    parser.add_argument(
        '--on-bad',
        choices=['fail', 'skip'],
        default='fail',
        help=(
            'count missing and unreadable images as '
            'wrong, or leave them out; either way they are named (default: fail)'
        ),
    )
    parser.add_argument(
        '--batch-size', type=int, default=8, help='images judged at once, per process (default: 8)'
    )
    parser.add_argument(
        '--num-workers',
        type=int,
        default=2,
        help='processes that read images, per process (default: 2)',
    )
    parser.add_argument(
        '--sheet-prompts',
        type=int,
        default=20,
        help='prompts on the picture sheet of each task (default: 20)',
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    prompts = commands.add_parser('prompts', help='write the prompts')
    prompts.add_argument('out', help='the .jsonl file to write')
    prompts.add_argument(
        '--seed', type=int, default=43, help="of the draw (default: 43, the paper's)"
    )
    prompts.add_argument(
        '--n',
        type=int,
        default=100,
        help="prompts drawn for each task but the first (default: 100, the paper's)",
    )
    prompts.add_argument('--force', action='store_true', help='overwrite OUT')
    score = commands.add_parser('score', help='score a folder of images')
    score.add_argument('folder', help="images in the reference's layout")
    score.add_argument(
        '--config',
        default=SCORING_CONFIG,
        help=(
            f'{CONFIG_HELP}; its GenEval metric names detector and colour '
            'classifier (default: %(default)s)'
        ),
    )
    score.add_argument('--work-dir', help='where results go (default: FOLDER)')
    add_config_options(
        score,
        'override config values, e.g. evaluations.geneval.metrics.geneval.detector.checkpoint=FILE',
    )
    add_launcher(score)
    _add_scoring_arguments(score)
    run = commands.add_parser('run', help='generate with a diffusers pipeline, and score')
    add_common_arguments(run)
    run.add_argument(
        '--prompts',
        default=None,
        metavar='FILE',
        help="a prompt file (default: GenEval's 553 prompts)",
    )
    run.add_argument('--seed', type=int, default=0, help='selects other noise (default: 0)')
    _add_scoring_arguments(run)
    summary = commands.add_parser('summary', help='print the scores of finished results')
    summary.add_argument('results', help="a results.jsonl, ours or the reference's")
    return parser.parse_args(argv)


def _prompts(args: argparse.Namespace) -> None:
    if args.n < 1:
        raise UsageError(f'--n must be at least 1, but is {args.n}')
    if osp.exists(args.out) and not args.force:
        raise UsageError(f'{args.out!r} exists; overwrite it with --force')
    try:
        os.makedirs(osp.dirname(osp.abspath(args.out)), exist_ok=True)
    except OSError as e:
        raise UsageError(f'the folder of {args.out!r} cannot be made: {e}') from e
    from mmfgm.evaluation.geneval import generate
    from mmfgm.evaluation.geneval.judging import to_jsonl

    rows = generate(args.seed, args.n)
    write_file(args.out, to_jsonl(rows).encode())
    print(f'{args.out}: {len(rows)} prompts')


def _start(args: argparse.Namespace) -> None:
    limits = dict(
        num_samples=0 if args.command == 'score' else 1,
        batch_size=1,
        num_workers=0,
        sheet_prompts=0,
    )
    for name, smallest in limits.items():
        if getattr(args, name) < smallest:
            raise UsageError(
                f'--{name.replace("_", "-")} must be at least {smallest}, but is'
                f' {getattr(args, name)}'
            )
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    from mmfgm.processes import connect

    init_default_scope('mmfgm')
    MMLogger.get_instance('mmfgm')
    connect(args.launcher, args.local_rank)


def _build_scorer(cfg: Config) -> Scorer:
    from mmfgm.apis import building
    from mmfgm.evaluation.geneval import Scorer, find_metric

    metric: Any = find_metric(cfg)
    return building(lambda: Scorer(metric.detector, metric.get('colors'), metric.get('options')))


def _score(
    args: argparse.Namespace, scorer: Scorer, folder: str, out_dir: str, nfe: int | None = None
) -> dict | None:
    from mmengine.device import get_device

    from mmfgm.evaluation.geneval import score_folder
    from mmfgm.processes import rank_and_size

    result = score_folder(
        folder,
        scorer.to(get_device()),
        out_dir,
        args.num_samples,
        args.on_bad == 'skip',
        args.batch_size,
        args.num_workers,
        args.sheet_prompts,
        nfe,
    )
    if rank_and_size()[0] == 0:
        _print(result, scorer, args.on_bad, out_dir, nfe)
    return result


def _print(result: dict, scorer: Scorer, on_bad: str, out_dir: str, nfe: int | None) -> None:
    from mmfgm.evaluation.geneval import format_scores

    bad = result['bad']
    if bad:
        shown = '\n  '.join(f'{name}: {reason}' for name, reason in list(bad.items())[:10])
        print(
            f'\n{len(bad)} images are missing or unreadable and'
            f' {"are left out" if on_bad == "skip" else "count as wrong"}; metrics.json lists'
            f' them:\n  {shown}{f"{chr(10)}  ..." if len(bad) > 10 else ""}'
        )
    print(
        f'\n{format_scores(result["scores"], result["rows"], nfe)}\n\nDetector:'
        f' {scorer.note or scorer.label}. Colours:'
        f' {scorer.colors_label or "not judged"}.\nWritten to {out_dir}: results.jsonl,'
        ' metrics.json, and a picture sheet for each task in sheets.',
        flush=True,
    )


def _run(args: argparse.Namespace) -> dict | None:
    cfg = load_config(args)
    if not cfg.get('pipeline'):
        raise UsageError(
            f'the config {args.config!r} describes no pipeline; expected'
            ' pipeline=dict(type="DiffusersPipeline", ...), as in configs/geneval/sd3.py'
        )
    import gc

    import torch
    from mmengine.device import get_device

    from mmfgm.apis import building
    from mmfgm.evaluation.geneval import generate_images, metadata_rows
    from mmfgm.processes import on_main
    from mmfgm.registry import TASK_UTILS

    pipeline = building(lambda: TASK_UTILS.build(cfg.pipeline))
    rows = on_main(lambda: metadata_rows(args.prompts))
    # on the CPU, and before hours of generating: whatever is wrong with the detector shows now
    scorer = _build_scorer(cfg)
    scorer.check(rows)
    pipeline.load(get_device())
    nfe = generate_images(pipeline, rows, cfg.work_dir, args.num_samples, args.seed)
    del pipeline
    gc.collect()
    torch.cuda.empty_cache()
    return _score(args, scorer, cfg.work_dir, cfg.work_dir, nfe)


def _summary(args: argparse.Namespace) -> dict:
    from mmfgm.evaluation.geneval import format_scores, summarize
    from mmfgm.evaluation.geneval.folder import read_results

    rows = read_results(args.results)
    scores = summarize(rows)
    nfe = detector = colors = None
    about = osp.join(osp.dirname(args.results), 'metrics.json')
    if osp.isfile(about):
        try:
            found = read_json(about, 'remove it, or score again')
            nfe, detector, colors = (found.get(name) for name in ('nfe', 'detector', 'colors'))
        except AttributeError as e:
            raise UsageError(
                f'{about!r} is not what scoring writes beside the results: {e}; remove it, or score'
                ' again'
            ) from e
    print(format_scores(scores, rows, nfe))
    if detector:
        print(f'\nDetector: {detector}. Colours: {colors or "not said"}.')
    return dict(scores=scores, rows=rows, bad={})


def geneval(argv: Sequence[str] | None = None) -> dict | None:
    """Do as the command line says; scoring returns ``scores``, ``rows`` and ``bad`` on the main
    process."""
    args = parse_args(argv)
    if args.command == 'prompts':
        return _prompts(args)
    if args.command == 'summary':
        return _summary(args)
    _start(args)
    if args.command == 'run':
        return _run(args)
    folder = args.folder.rstrip(os.sep) or args.folder
    # before the models are loaded, and perhaps downloaded
    from mmfgm.evaluation.geneval.folder import scan_folder
    from mmfgm.processes import on_main

    on_main(lambda: scan_folder(folder, args.num_samples))
    return _score(args, _build_scorer(load_config(args)), folder, args.work_dir or folder)


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(geneval, argv)


if __name__ == '__main__':
    main()
