# Copyright (c) mmfgm authors.
"""Generate images with a trained one-step generator, or its teacher, or both beside each other.

What to generate is one of: --prompt TEXT ..., --prompts FILE (.txt, .jsonl, .csv or .parquet),
--labels N ..., or --num-samples N, which for a model with classes goes through them in turn. OUT
gets 000000.png and so on, grid.png, and metadata.jsonl with a line for each image, and
mmfgm_images.json, by which --force knows it; with --compare, the teacher's images too, and
compare.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os.path as osp
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmfgm.errors import UsageError
from mmfgm.files import whole_folder
from mmfgm.version import __version__

from .cli import RUN_HELP, add_config_options, config_options, run_tool

if TYPE_CHECKING:
    import torch

    from mmfgm.apis import FGMInferencer
    from mmfgm.models import Sampling

METADATA = 'metadata.jsonl'
# by which --force knows its own folders: other data sets have a metadata.jsonl too
MARKER = 'mmfgm_images.json'
IN_GRID = 100


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'config', help=f'{RUN_HELP}; or the folder of an export, which needs no weights'
    )
    parser.add_argument('weights', nargs='?', help='training checkpoint or work dir, or an export')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--prompt', nargs='+', metavar='TEXT')
    what.add_argument('--prompts', metavar='FILE')
    what.add_argument('--labels', nargs='+', type=int, metavar='N')
    what.add_argument('--num-samples', type=int, metavar='N')
    parser.add_argument(
        '--column', default='prompt', help='of a .jsonl, .csv or .parquet (default: prompt)'
    )
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=int,
        default=[0],
        metavar='N',
        help=(
            'one for each image; a single one is of '
            'the first, and the next image has the next (default: 0)'
        ),
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='the folder to make')
    parser.add_argument('--force', action='store_true', help='replace OUT, if this tool made it')
    parser.add_argument(
        '--network', default=None, metavar='NAME', help='default: the average of the generator'
    )
    parser.add_argument(
        '--compare',
        nargs='?',
        type=int,
        const=0,
        default=None,
        metavar='NFE',
        help=(
            'draw the teacher at NFE '
            "evaluations too (default: as the config's sample pictures do, or 50)"
        ),
    )
    parser.add_argument('--solver', default=None, help="the teacher's: euler or heun")
    parser.add_argument(
        '--guidance', type=float, default=None, metavar='SCALE', help="the teacher's; 1 for none"
    )
    parser.add_argument(
        '--shift',
        type=float,
        default=None,
        help="of the teacher's time grid; 3 for SD3's scheduler",
    )
    parser.add_argument(
        '--spacing',
        default=None,
        help="of the teacher's times: uniform; edm; or pipeline, all as its own pipeline",
    )
    parser.add_argument(
        '--nfe',
        type=int,
        default=None,
        metavar='N',
        help='network calls; a generator of few steps takes any number up to its own, the default',
    )
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='of a generator of few steps: no fresh noise between calls',
    )
    parser.add_argument(
        '--batch-size', type=int, default=8, help='images per network call (default: 8)'
    )
    parser.add_argument(
        '--precision',
        choices=['fp32', 'bf16', 'auto'],
        default='fp32',
        help='of the networks (default: fp32)',
    )
    parser.add_argument('--device', default=None, help='default: the GPU, if there is one')
    add_config_options(parser)
    return parser.parse_args(argv)


def build_inferencer(args: argparse.Namespace) -> FGMInferencer:
    """The inferencer that the command line names."""
    from mmfgm.apis import FGMInferencer, is_export, read_config, weights_of

    options = dict(device=args.device, precision=args.precision)
    if is_export(args.config):
        return FGMInferencer(args.config, args.weights, **options)
    cfg = read_config(args.config, config_options(args.cfg_options))
    return FGMInferencer(cfg, weights_of(args.config, args.weights), **options)


def read_inputs(args: argparse.Namespace, inferencer: FGMInferencer) -> list:
    """Prompts, labels, or None for each unconditional sample."""
    if args.prompts:
        from mmfgm.caches import read_prompts

        return read_prompts(args.prompts, args.column)[1]
    if args.num_samples is None:
        return args.prompt or args.labels
    if args.num_samples < 1:
        raise UsageError(f'--num-samples must be at least 1, but is {args.num_samples}')
    if inferencer.condition == 'prompts':
        raise UsageError('this model takes prompts: give --prompt or --prompts, not --num-samples')
    classes = inferencer.num_classes
    return [i % classes if classes else None for i in range(args.num_samples)]


def samplings_of(args: argparse.Namespace, inferencer: FGMInferencer) -> dict[str, Sampling]:
    """File suffix to how those images are made: the network asked for, and with --compare the
    teacher."""
    asked = {
        name: getattr(args, name)
        for name in ('solver', 'guidance', 'shift', 'spacing')
        if getattr(args, name) is not None
    }
    main = inferencer.default_sampling(args.network)
    integrated = main.network not in inferencer.model.generators
    main = main.but(
        **(asked if integrated else {}),
        **({} if args.nfe is None else dict(nfe=args.nfe)),
        deterministic=args.deterministic,
    )
    samplings = {'': main}
    if args.compare is None:
        if asked and not integrated:
            raise UsageError(
                f'--{", --".join(asked)} are of an ODE solver, and {main.network} has none; add'
                ' --compare'
            )
        return samplings
    if 'teacher' not in inferencer.networks:
        raise UsageError(
            '--compare needs the teacher, and an export holds the generator alone: give the config'
            ' of the training, then the checkpoint or the export'
        )
    nfe = dict(nfe=args.compare) if args.compare else {}
    return {
        **samplings,
        '_teacher': inferencer.default_sampling('teacher').but(**asked, **nfe),
    }


def generate_all(
    inferencer: FGMInferencer,
    inputs: list,
    seeds: list[int],
    sampling: Sampling,
    batch_size: int,
    folder: str,
    suffix: str,
) -> list[torch.Tensor]:
    """Generate and save every image; returns the first ones, for the grid."""
    from mmfgm.apis import convert
    from mmfgm.processes import Progress

    options = dict(
        network=sampling.network,
        nfe=sampling.nfe,
        solver=sampling.solver,
        shift=sampling.shift,
        spacing=sampling.spacing,
        guidance=sampling.guidance,
        guidance_channels=sampling.guidance_channels,
        deterministic=sampling.deterministic,
    )
    kept: list[torch.Tensor] = []
    print(f'{sampling.network}, {sampling.nfe} NFE', flush=True)
    progress = Progress(len(inputs), 'image')
    for first in range(0, len(inputs), batch_size):
        part = inputs[first : first + batch_size]
        part = len(part) if part[0] is None else part
        samples = inferencer(
            part, seeds[first : first + batch_size], batch_size, out='tensor', **options
        )['predictions']
        kept += samples[: IN_GRID - len(kept)]
        for i, sample in enumerate(samples, first):
            convert(sample, 'pil').save(osp.join(folder, f'{i:06d}{suffix}.png'))
        progress.step(len(samples))
    return kept


def generate(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says; the folder appears only when it is whole."""
    args = parse_args(argv)
    import torch
    from PIL import Image

    from mmfgm.apis import as_seeds, building, check_images, draw_grid
    from mmfgm.evaluation import draw_panels

    inferencer = building(lambda: build_inferencer(args))
    samplings = samplings_of(args, inferencer)
    inputs = read_inputs(args, inferencer)
    inferencer.check_inputs(len(inputs) if inputs[0] is None else inputs)
    seeds = as_seeds(args.seeds[0] if len(args.seeds) == 1 else args.seeds, len(inputs))
    if inferencer.model.decoder is None:
        check_images(torch.empty(inferencer.model.event_shape))
    if args.batch_size < 1:
        raise UsageError(f'--batch-size must be at least 1, but is {args.batch_size}')
    condition = dict(labels='label', prompts='prompt').get(inferencer.condition)
    with whole_folder(args.out, args.force, MARKER) as folder:
        panels = {}
        lines = []
        for suffix, sampling in samplings.items():
            panels[f'{sampling.network}, {sampling.nfe} NFE'] = generate_all(
                inferencer, inputs, seeds, sampling, args.batch_size, folder, suffix
            )
            lines += [
                dict(
                    file=f'{i:06d}{suffix}.png',
                    seed=seed,
                    **({condition: value} if condition else {}),
                    **vars(sampling),
                )
                for i, (seed, value) in enumerate(zip(seeds, inputs))
            ]
        first = next(iter(panels.values()))
        nrow = math.ceil(math.sqrt(len(first)))
        Image.fromarray(draw_grid(first, nrow)).save(osp.join(folder, 'grid.png'))
        if len(panels) > 1:
            picture = draw_panels(
                {title: torch.stack(samples) for title, samples in panels.items()}, nrow
            )
            Image.fromarray(picture).save(osp.join(folder, 'compare.png'))
        with open(osp.join(folder, METADATA), 'w', encoding='utf-8') as f:
            f.writelines(f'{json.dumps(line, ensure_ascii=False)}\n' for line in lines)
        with open(osp.join(folder, MARKER), 'w', encoding='utf-8') as f:
            f.write(
                json.dumps(dict(format=1, images=len(lines), mmfgm=__version__), indent=2) + '\n'
            )
    print(
        f'{args.out}: {len(lines):,} images, grid.png,'
        f' {METADATA}{" and compare.png" if len(panels) > 1 else ""}'
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(generate, argv)


if __name__ == '__main__':
    main()
