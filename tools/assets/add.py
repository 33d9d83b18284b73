# Copyright (c) mmfgm authors.
"""Put a file under assets/, from where configs find it as mmfgm::assets/NAME, and write into
assets/assets.json what made it and its SHA-256. A teacher, for example::

    python tools/merge_checkpoint.py work_dirs/reflow/fashion teacher.safetensors \\
        --network network_ema
    python tools/assets/add.py teacher.safetensors fashion/teacher.safetensors \\
        --command 'python tools/train.py configs/reflow/fashion.py' \\
        --about 'the average after ... iterations, FD ... at 50 NFE'

and a config that distils it has
``teacher=dict(checkpoint='mmfgm::assets/fashion/teacher.safetensors', prefix='')``.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmfgm.errors import UsageError
from mmfgm.files import read_json, sha256, write_file
from mmfgm.tools.cli import run_tool

ASSETS = Path(__file__).resolve().parents[2] / 'assets'
MAX_FILE = 8_000_000
MAX_ALL = 20_000_000


def add(argv: Sequence[str] | None = None) -> None:
    """Add as the command line says.

    Raises:
        UsageError: If the file is missing or no safetensors, or the assets would become too large.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', help='a .safetensors file')
    parser.add_argument('name', help='its name below assets/, such as fashion/teacher.safetensors')
    parser.add_argument('--command', required=True, help='what made the file')
    parser.add_argument('--about', required=True, help='what it is, and how good, as measured')
    args = parser.parse_args(argv)
    file = Path(args.file)
    if not file.is_file() or file.suffix != '.safetensors' or not args.name.endswith(file.suffix):
        raise UsageError(
            f'{args.file!r} as {args.name!r}: an asset is a .safetensors file; write one with'
            ' tools/merge_checkpoint.py'
        )
    index = ASSETS / 'assets.json'
    known = read_json(str(index), 'git checkout assets') if index.exists() else {}
    size = file.stat().st_size
    others = sum((ASSETS / name).stat().st_size for name in known if name != args.name)
    if size > MAX_FILE or size + others > MAX_ALL:
        raise UsageError(
            f'{args.file} has {size / 1e6:.1f} MB, the other assets {others / 1e6:.1f} MB; keep to'
            f' {MAX_FILE / 1e6:.0f} MB a file and {MAX_ALL / 1e6:.0f} MB in all'
        )
    os.makedirs((ASSETS / args.name).parent, exist_ok=True)
    write_file(str(ASSETS / args.name), file.read_bytes())
    entry = dict(sha256=sha256(args.file), command=args.command, about=args.about)
    known[args.name] = entry
    write_file(str(index), json.dumps(known, indent=2, sort_keys=True) + '\n')
    print(f'mmfgm::assets/{args.name}: {entry["sha256"]}')


if __name__ == '__main__':
    run_tool(add, sys.argv[1:])
