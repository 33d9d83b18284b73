# Copyright (c) mmfgm authors.
"""Reading configs, and what goes wrong in building them."""

import os.path as osp
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mmengine.config import Config

import mmfgm
from mmfgm.config import leaves, parse_dump, resolve
from mmfgm.errors import UsageError
from mmfgm.files import asset_path, is_disk_error, read_text

from .runs import no_work_dir, starts
from .schema import check_run_config

T = TypeVar('T')


def config_path(name: str) -> str:
    """The file that a config's path, or ``mmfgm::PATH`` of one that comes with mmfgm, means.

    Raises:
        UsageError: If there is none.
    """
    path = name
    if name.startswith('mmfgm::'):
        path = osp.join(osp.dirname(mmfgm.__file__), '.mim', 'configs', name[len('mmfgm::') :])
    if not osp.isfile(path):
        raise UsageError(
            f'there is no config {name!r} (looked for {path!r}); name an existing one, or the work'
            ' dir of a run'
        )
    return path


def read_config(name: str, options: Mapping[str, Any] | None = None) -> Config:
    """Read the config that a name means (see :func:`config_path`), or that of the run in a work dir
    (see :func:`read_run_config`), with ``options`` merged and references resolved (see
    :func:`mmfgm.config.resolve`).

    Raises:
        UsageError: If there is no such file, it cannot be parsed, or ``options`` do not fit it.
    """
    if osp.isdir(name):
        cfg = read_run_config(name)
    else:
        path = config_path(name)
        try:
            # a config is a program of the user's: whatever it raises is about the config
            cfg = Config.fromfile(path)
        except Exception as e:
            raise UsageError(f'config {name!r} cannot be read: {type(e).__name__}: {e}') from e
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError, AttributeError) as e:
        raise UsageError(
            f'--cfg-options {options} does not fit the config: {type(e).__name__}: {e}'
        ) from e
    return resolve(cfg, options or ())


def read_dump(path: str) -> Config:
    """Read the config that a run dumped into its work dir, as data: nothing in it is run.

    A dump holds assignments of plain values, as MMEngine writes them: literals, lists, tuples,
    dicts and ``dict(...)``. A work dir may come from somebody else.

    Raises:
        UsageError: If the file cannot be read, or says anything else.
    """
    try:
        return Config(parse_dump(read_text(path, 'name the work dir of a run')))
    except UsageError:
        raise
    except (OSError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as e:
        raise UsageError(
            f'expected {path!r} to be the config that a run wrote, found a file that cannot be read'
            f' as one ({str(e)[:200]}); name the work dir of a run'
        ) from e


def read_run_config(work_dir: str) -> Config:
    """The config of the last start in a work dir, read as data and held against what a work dir
    alone may say (see :func:`~mmfgm.apis.schema.check_run_config`).

    Its ``work_dir`` is the folder as it is named now, and a teacher that lay beside the run is
    found beside it, also after both have moved. Whether to resume is not part of it.

    Raises:
        UsageError: If the folder holds no run, or its config says more than data can.
    """
    # a start that was refused logged nothing, and its config is not that of the checkpoints
    folders = starts(work_dir) or starts(work_dir, 'config.py')
    if not folders:
        raise UsageError(no_work_dir(work_dir))
    path = osp.join(folders[-1], 'vis_data', 'config.py')
    cfg = read_dump(path)
    check_run_config(cfg, path)
    for key in ('resume', 'load_from'):
        cfg.pop(key, None)
    values = dict(leaves(dict(cfg.items()), ''))
    there, before = values.get('model.teacher.checkpoint'), values.get('work_dir')
    if isinstance(there, str) and isinstance(before, str) and not osp.exists(asset_path(there)):
        moved = osp.normpath(osp.join(work_dir, osp.relpath(there, before)))
        if osp.exists(moved):
            cfg.model.teacher.checkpoint = moved
    cfg.work_dir = work_dir
    return cfg


def weights_of(config: str, weights: str | None) -> str | None:
    """The weights of a command that takes a config and perhaps weights: alone, the work dir of a
    run stands for its config and its last checkpoint; ``mmfgm::assets/...`` names weights that come
    with mmfgm.
    """
    if weights is not None:
        return asset_path(weights)
    return config if osp.isdir(config) else None


def building(build: Callable[[], T]) -> T:
    """Call ``build()`` and turn what a registry raises for a wrong config into a UsageError.

    An unknown type is a KeyError there, an unknown or missing argument a TypeError.
    """
    try:
        return build()
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError, OSError) as e:
        if is_disk_error(e):
            raise
        cause = e.__cause__ if isinstance(e.__cause__, UsageError) else e
        raise UsageError(f'the config cannot be built: {str(cause).strip(chr(34))}') from e
