# Copyright (c) mmfgm authors.
import os.path as osp
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

import mmfgm
from mmfgm.config import resolve
from mmfgm.errors import UsageError


def config_path(name: str) -> str:
    """The file that a config's path, or ``mmfgm::PATH`` of one that comes with mmfgm, means.

    Raises:
        UsageError: If there is none.
    """
    path = name
    if name.startswith('mmfgm::'):
        path = osp.join(osp.dirname(mmfgm.__file__), '.mim', 'configs', name[len('mmfgm::') :])
    if not osp.isfile(path):
        raise UsageError(f'there is no config {name!r} (looked for {path!r})')
    return path


def read_config(name: str, options: Mapping[str, Any] | None = None) -> Config:
    """Read the config that a name means (see :func:`config_path`), with ``options`` merged and
    references resolved (see :func:`mmfgm.config.resolve`).

    Raises:
        UsageError: If there is no such file, it cannot be parsed, or ``options`` do not fit it.
    """
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
