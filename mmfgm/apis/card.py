# Copyright (c) mmfgm authors.
"""Where an export comes from, and the model card that says so."""

import hashlib
import os.path as osp
import re
from glob import escape as glob_escape
from glob import glob
from typing import Any

from mmengine.config import Config

from mmfgm.errors import DamagedError
from mmfgm.files import sha256
from mmfgm.models import EXTRAS, latest_checkpoint, read_pickle
from mmfgm.version import __version__

from .report.data import read_run
from .runs import is_work_dir

# of a model's card on the hub
LICENCE_FIELDS = ('license_name', 'license', 'license_link')


def describe_source(cfg: Config, checkpoint: str, network: str) -> dict[str, Any]:
    """Config and its hash, checkpoint, iterations, and what the run measured at that iteration."""
    checkpoint = latest_checkpoint(checkpoint) or checkpoint
    extras = osp.join(checkpoint, EXTRAS) if osp.isdir(checkpoint) else checkpoint
    known = {}
    if not extras.endswith('.safetensors') and osp.isfile(extras):
        known = read_pickle(extras, wanted=lambda part: part == 'message_hub')
    try:
        last = known.get('message_hub', {}).get('runtime_info', {}).get('iter')
        iterations = None if last is None else int(last) + 1
    except (AttributeError, TypeError, ValueError) as e:
        raise DamagedError(extras, f'its message_hub: {e}') from e
    metrics = {}
    run = osp.dirname(osp.abspath(checkpoint))
    if iterations and is_work_dir(run):
        read = read_run(run)
        measured = {
            name: entry['sampling']['network']
            for name, entry in (read.cfg.get('evaluations') or {}).items()
        }
        metrics = {
            name: read.scalars[name][iterations]
            for name in read.metrics
            if iterations in read.scalars[name] and measured[name.split('/')[0]] == network
        }
    return dict(
        config=osp.basename(cfg.filename) if cfg.filename else None,
        config_sha256=hashlib.sha256(cfg.pretty_text.encode()).hexdigest(),
        checkpoint=osp.basename(checkpoint),
        network=network,
        iterations=iterations,
        metrics=metrics,
        mmfgm=__version__,
    )


def hash_weights(folder: str) -> dict[str, str]:
    """File to sha256 of every safetensors file of a folder."""
    return {
        osp.basename(path): sha256(path)
        for path in sorted(glob(osp.join(glob_escape(folder), '*.safetensors')))
    }


def find_licence(folder: str) -> dict[str, str]:
    """The :data:`LICENCE_FIELDS` in the head of a model's card, as they stand there; or else
    ``file``, a LICENSE beside it."""
    card = osp.join(folder, 'README.md')
    if osp.isfile(card):
        with open(card, encoding='utf-8') as f:
            head = re.match(r'---\n(.*?)\n---', f.read(), re.DOTALL)
        fields = (
            dict(re.findall(r'^(license\w*):\s*(\S.*)$', head.group(1), re.MULTILINE))
            if head
            else {}
        )
        fields = {key: fields[key] for key in LICENCE_FIELDS if key in fields}
        if fields:
            return fields
    files = licence_files(folder)
    return dict(file=osp.basename(files[0])) if files else {}


def licence_files(folder: str) -> list[str]:
    """The LICENSE files of a model."""
    return sorted(glob(osp.join(glob_escape(folder), 'LICENSE*')))


def write_card(
    usage: str,
    source: dict[str, Any],
    weights: dict[str, str],
    dtype: str,
    max_nfe: int = 1,
    base: str | None = None,
    licence: dict[str, str] | None = None,
) -> str:
    """The README.md of an export.

    Args:
        usage (str): Python lines that make an image.
        source (dict): See :func:`describe_source`.
        weights (dict[str, str]): See :func:`hash_weights`.
        dtype (str): Of the weights.
        max_nfe (int): Network calls of an image at most.
        base (str, optional): Name of the pipeline that the other parts come from.
        licence (dict[str, str], optional): Of the base, see :func:`find_licence`.
    """
    steps = 'one' if max_nfe == 1 else 'few'
    library = 'diffusers' if base else 'mmfgm'
    licence = licence or {}
    stated = ', '.join(licence[key] for key in LICENCE_FIELDS if key in licence)
    stated = stated or (
        f'see {licence["file"]}' if licence else 'not stated there; it holds for these weights too'
    )
    head = [
        f'library_name: {library}',
        *([f'base_model: {base}'] if base and re.fullmatch(r'[\w.-]+/[\w.-]+', base) else []),
        *(f'{key}: {licence[key]}' for key in LICENCE_FIELDS if key in licence),
        f'tags: [{steps}-step, flow-matching, flow-generator-matching]',
    ]
    metrics = ''.join(f'| {name} | {value:.6g} |\n' for name, value in source['metrics'].items())
    rows = {
        'Network calls per image': 1 if max_nfe == 1 else f'1 to {max_nfe}',
        'Config': f'`{source["config"]}`, sha256 of its content `{source["config_sha256"]}`',
        'Checkpoint': f'`{source["checkpoint"]}`, network `{source["network"]}`',
        'Iterations': (
            source['iterations']
            if source['iterations'] is not None
            else 'not recorded in the checkpoint'
        ),
        'Weights': (
            f'{dtype}; '
            + ', '.join(f'`{name}` sha256 `{digest}`' for name, digest in weights.items())
        ),
        **({'Base': f'`{base}`', 'Licence of the base': stated} if base else {}),
        'Made with': f'mmfgm {source["mmfgm"]}',
    }
    table = ''.join(f'| {name} | {value} |\n' for name, value in rows.items())
    return '\n'.join(
        [
            '---',
            *head,
            '---',
            '',
            f'# {steps.capitalize()}-step generator',
            '',
            (
                'Distilled from a flow-matching model by Flow Generator Matching'
                ' (https://arxiv.org/abs/2410.19310).'
            ),
            '',
            '```python',
            usage.strip(),
            '```',
            '',
            '| | |',
            '| --- | --- |',
            table,
            *(
                [
                    'Measured in training at this iteration:',
                    '',
                    '| metric | value |',
                    '| --- | --- |',
                    metrics,
                ]
                if metrics
                else ['No metric was recorded in training at this iteration.', '']
            ),
        ]
    )
