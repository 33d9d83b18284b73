# Copyright (c) mmfgm authors.
"""Which folders are work dirs, and what in them belongs to which start."""

import os.path as osp
from glob import escape as glob_escape
from glob import glob


def starts(folder: str, file: str = 'scalars.json') -> list[str]:
    """Folders of the starts that left something in ``vis_data/FILE``, oldest first; by default
    those that logged a value."""
    found = glob(osp.join(glob_escape(folder), '*', 'vis_data', file))
    return sorted(osp.dirname(osp.dirname(path)) for path in found if osp.getsize(path))


def is_work_dir(folder: str) -> bool:
    """Whether a training has logged something into the folder."""
    return bool(starts(folder))


def no_work_dir(folder: str) -> str:
    """What a message says of a folder that :func:`is_work_dir` denies."""
    if not osp.isdir(folder):
        return (
            f'there is no folder {folder!r}; name the work dir of a training, for example'
            ' work_dirs/fgm/digits'
        )
    if glob(osp.join(glob_escape(folder), '*', '*.log')):
        return (
            f'the training in {folder!r} has logged no values yet'
            ' (TIMESTAMP/vis_data/scalars.json); wait for its first ones'
        )
    inside = [
        path for path in sorted(glob(osp.join(glob_escape(folder), '*'))) if is_work_dir(path)
    ]
    hint = (
        f'it holds {", ".join(inside)}: name one of them'
        if inside
        else (
            'expected TIMESTAMP/vis_data/scalars.json in it, which every training leaves; name the'
            ' folder after --work-dir'
        )
    )
    return f'{folder!r} is no work dir of a training; {hint}'
