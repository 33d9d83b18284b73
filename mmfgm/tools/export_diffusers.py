# Copyright (c) mmfgm authors.
"""Export a trained one-step generator for people who do not train.

Of a network that comes from a pipeline, such as SD3's, OUT is a pipeline for plain diffusers, with
no mmfgm: the network is the only part that differs from the base, and
DiffusionPipeline.from_pretrained(OUT)(prompt, num_inference_steps=1, guidance_scale=1.0) makes the
generator's one-step image. Of any other network, OUT is a safetensors file and its description, for
mmfgm.apis.OneStepPipeline and FGMInferencer. OUT appears only when it is whole.
"""

import argparse
from collections.abc import Sequence

from mmfgm.errors import UsageError

from .cli import RUN_HELP, add_config_options, config_options, run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help=RUN_HELP)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help=(
            'a .pth file, a sharded checkpoint, a work dir, meaning its last checkpoint, or '
            'a file of tools/merge_checkpoint.py'
        ),
    )
    parser.add_argument('out', help='the folder to make')
    parser.add_argument(
        '--base',
        default=None,
        metavar='MODEL',
        help=(
            "pipeline's folder in diffusers' format, or its id on the "
            "hub, whose other parts are taken (default: the config's model.network.pretrained)"
        ),
    )
    parser.add_argument(
        '--network',
        default=None,
        metavar='NAME',
        help=(
            "which average of the generator, or generator itself (default: the config's first"
            ' average)'
        ),
    )
    parser.add_argument(
        '--dtype',
        choices=['fp32', 'bf16', 'fp16'],
        default='fp32',
        help='of the written weights (default: fp32)',
    )
    parser.add_argument(
        '--max-shard-size',
        default='10GB',
        metavar='SIZE',
        help="of the pipeline's files (default: 10GB)",
    )
    parser.add_argument(
        '--lora',
        action='store_true',
        help=(
            "of a training with model.lora, the adapters alone, for diffusers' load_lora_weights;"
            ' refused where the generator has a t_star, c_in, c_out or c_skip other than 1, or a'
            ' teacher of its own, as adapters cannot hold that: without --lora, all of it is merged'
            ' into the transformer'
        ),
    )
    parser.add_argument(
        '--push-to-hub',
        default=None,
        metavar='OWNER/NAME',
        help='put the export into this repository of the Hugging Face hub too',
    )
    parser.add_argument(
        '--private', action='store_true', help='with --push-to-hub, if it makes the repository'
    )
    parser.add_argument('--force', action='store_true', help='replace OUT, if it is an export')
    add_config_options(parser, 'override config values, as in the training')
    # a lone argument before an option would be taken for all three
    return parser.parse_intermixed_args(argv)


def export_diffusers(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    args = parse_args(argv)
    from mmfgm.apis import building, read_config, weights_of
    from mmfgm.apis.export import HubRepository, export_generator

    cfg = read_config(args.config, config_options(args.cfg_options))
    checkpoint = weights_of(args.config, args.checkpoint)
    if checkpoint is None:
        raise UsageError(
            f'{args.config!r} is a config, whose weights are elsewhere; give CONFIG CHECKPOINT OUT,'
            ' or WORK_DIR OUT'
        )
    if args.private and not args.push_to_hub:
        raise UsageError('--private is of the repository of --push-to-hub; add it, or leave it out')
    # refused there, if at all, before anything is read
    hub = HubRepository(args.push_to_hub, args.private) if args.push_to_hub else None
    made = building(
        lambda: export_generator(
            cfg,
            checkpoint,
            args.out,
            args.base,
            args.network,
            args.dtype,
            args.max_shard_size,
            args.lora,
            args.force,
        )
    )
    opened = dict(
        pipeline=f'diffusers.DiffusionPipeline.from_pretrained({args.out!r})',
        lora=f"pipe.load_lora_weights({args.out!r}), pipe being diffusers' pipeline of the base",
        generator=f'mmfgm.apis.OneStepPipeline.from_pretrained({args.out!r})',
    )[made]
    print(f'{args.out}: open it with {opened}; README.md says more')
    if hub:
        print(f'On the hub: {hub.push(args.out)}')


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(export_diffusers, argv)


if __name__ == '__main__':
    main()
