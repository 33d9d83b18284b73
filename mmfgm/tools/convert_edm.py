# Copyright (c) mmfgm authors.
"""Convert one of EDM's published networks (a pickle) to safetensors and a config; nothing in the
pickle is run."""

import argparse
import json
import os.path as osp
from collections.abc import Sequence

from mmfgm.errors import UsageError
from mmfgm.files import sha256, write_file

from .cli import run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'pickle',
        help='for example edm-cifar10-32x32-cond-vp.pkl or edm-imagenet-64x64-cond-adm.pkl',
    )
    parser.add_argument(
        'out', help='the .safetensors file to write; its config goes beside it, as .json'
    )
    parser.add_argument('--key', default='ema', help='which network of the pickle (default: ema)')
    parser.add_argument(
        '--sha256',
        help='what the pickle must have: without it, damage to its numbers is not noticed',
    )
    parser.add_argument('--force', action='store_true', help='overwrite existing files')
    return parser.parse_args(argv)


def convert(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    args = parse_args(argv)
    stem, extension = osp.splitext(args.out)
    if extension != '.safetensors':
        raise UsageError(
            f'the output must be a .safetensors file, but is {args.out!r}; name it'
            f' {stem + ".safetensors"!r}'
        )
    existing = [name for name in (args.out, f'{stem}.json') if osp.exists(name)]
    if existing and not args.force:
        raise UsageError(
            f'{existing} would be overwritten; name another output, or say so with --force'
        )
    from safetensors.torch import save

    from mmfgm.models import read_edm_pickle, safetensors_metadata

    state, config = read_edm_pickle(args.pickle, args.key, args.sha256)
    source = dict(source=osp.basename(args.pickle), sha256=sha256(args.pickle))
    state = {name: value.contiguous() for name, value in state.items()}
    # not save_file, whose files only their owner may read
    write_file(args.out, save(state, safetensors_metadata(state, **source)))
    write_file(f'{stem}.json', f'{json.dumps({**config, **source}, indent=2)}\n'.encode())

    # resample_filter is a constant
    parameters = sum(
        value.numel() for name, value in state.items() if not name.endswith('.resample_filter')
    )
    unet = ', '.join(f'{name}={value!r}' for name, value in config['unet'].items())
    print(
        f'{args.out}: {len(state)} tensors with {parameters:,} parameters; {stem}.json: its'
        ' config\n\n'
        'For the config:\n'
        f"network = dict(type='EDMVelocity', sigma_data={config['sigma_data']},"
        f' unet=dict({unet}))\n'
        f"teacher=dict(checkpoint={args.out!r}, into='unet')"
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(convert, argv)


if __name__ == '__main__':
    main()
