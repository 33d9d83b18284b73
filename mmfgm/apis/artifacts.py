# Copyright (c) mmfgm authors.
"""What an export is on disk, and how to tell it from a training checkpoint."""

import os
import os.path as osp

from mmfgm.errors import DamagedError, UsageError
from mmfgm.files import check_regular, check_seal, read_json, sha256
from mmfgm.models.families import family_of

from .schema import check_description

# lies in every export of ours and says what it is; a diffusers pipeline ignores it
EXPORT_FILE = 'mmfgm_export.json'
WEIGHTS_FILE = 'generator.safetensors'
PIPELINE_FILE = 'model_index.json'
# entry of a description: SHA-256 of the others
SEAL = 'description_sha256'


def is_export(path: str | None) -> bool:
    """Whether a folder was written by ``tools/export_diffusers.py``."""
    return path is not None and osp.isfile(osp.join(path, EXPORT_FILE))


def check_weights(path: str, export: dict) -> None:
    """Hold the weights of an export against the checksums in its description.

    Args:
        path (str): The export.
        export (dict): Its description, see :func:`read_export`.

    Raises:
        DamagedError: Names the first file that is not what was exported.
    """
    folder = path
    if export['kind'] == 'pipeline':
        folder = osp.join(path, family_of(export['model']['network']['type']).subfolder)
    recorded = export.get('weights_sha256')
    if not isinstance(recorded, dict) or not recorded:
        raise DamagedError(osp.join(path, EXPORT_FILE), 'it has no weights_sha256; export again')
    found = {}
    for name in recorded:
        file = osp.join(folder, osp.basename(str(name)))
        try:
            check_regular(file)
            found[name] = sha256(file)
        except OSError as e:
            raise DamagedError(file, str(e)) from e
        if found[name] != recorded[name]:
            raise DamagedError(
                file,
                f'it has the SHA-256 {found[name]}, but {EXPORT_FILE} says'
                f' {str(recorded[name])[:80]}',
            )


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
    try:
        check_seal(export, SEAL)
    except ValueError as e:
        raise DamagedError(
            file, f'it is not what was exported (if you changed it yourself, delete {SEAL!r})'
        ) from e
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
