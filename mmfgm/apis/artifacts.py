# Copyright (c) mmfgm authors.
"""What an export is on disk, and how to tell it from a training checkpoint."""

import os
import os.path as osp

from mmfgm.errors import UsageError
from mmfgm.files import read_json
from mmfgm.models.families import family_of

from .schema import check_description

# lies in every export of ours and says what it is; a diffusers pipeline ignores it
EXPORT_FILE = 'mmfgm_export.json'
WEIGHTS_FILE = 'generator.safetensors'
PIPELINE_FILE = 'model_index.json'


def is_export(path: str | None) -> bool:
    """Whether a folder was written by ``tools/export_diffusers.py``."""
    return path is not None and osp.isfile(osp.join(path, EXPORT_FILE))


def read_export(path: str) -> dict:
    """The description of an export: ``kind``, ``network``, ``model``, ``text_encoder`` and where it
    comes from.

    Raises:
        UsageError: If ``path`` is something else, such as a training checkpoint, or the export is
            damaged.
    """
    if not is_export(path):
        found = _describe(path)
        raise UsageError(
            f'{path!r} is {found}, expected an export: a folder with {EXPORT_FILE}; make one'
            ' with tools/export_diffusers.py CONFIG CHECKPOINT OUT, or use FGMInferencer(config,'
            ' checkpoint)'
        )
    file = osp.join(path, EXPORT_FILE)
    export = read_json(file, 'export again', dict)
    check_description(export, file)
    if export['kind'] == 'lora':
        raise UsageError(
            f"{path!r} holds adapters alone, for diffusers' load_lora_weights; name the training"
            ' checkpoint, or an export without --lora'
        )
    weights = osp.join(path, WEIGHTS_FILE if export['kind'] == 'generator' else PIPELINE_FILE)
    if not osp.isfile(weights):
        raise UsageError(f'the export {path!r} is not whole: {weights!r} is missing; export again')
    if (
        export['kind'] == 'pipeline'
    ):  # its parts lie beside the description, wherever the folder was moved
        export['model']['network']['pretrained'] = path
        export['model']['decoder'] = family_of(export['model']['network']['type']).decoder(path)
    return export


def check_checkpoint(path: str) -> None:
    """Refuse what is no training checkpoint, before it is read as one.

    Raises:
        UsageError: If ``path`` does not exist, is an export, or a diffusers pipeline.
    """
    if not osp.exists(path):
        raise UsageError(
            f'checkpoint {path!r} does not exist (looked in {os.getcwd()}); train it first, or name'
            ' an existing file, sharded directory or work dir'
        )
    if is_export(path) or osp.isfile(osp.join(path, PIPELINE_FILE)):
        raise UsageError(
            f'{path!r} is {_describe(path)}, expected a training checkpoint: a .pth file, a'
            ' sharded directory, a work dir, or a .safetensors file of tools/merge_checkpoint.py'
        )


def _describe(path: str) -> str:
    if not osp.exists(path):
        return 'not there'
    if is_export(path):
        return 'an export already'
    if osp.isfile(osp.join(path, PIPELINE_FILE)):
        return 'a diffusers pipeline that is no export of ours'
    if osp.isfile(path):
        return (
            'a training checkpoint'
            if path.endswith(('.pth', '.safetensors'))
            else 'a file of another kind'
        )
    whole = any(osp.isfile(osp.join(path, name)) for name in ('last_checkpoint', '.metadata'))
    return 'a training checkpoint' if whole else 'a folder of another kind'
