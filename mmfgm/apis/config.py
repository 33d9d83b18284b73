# Copyright (c) mmfgm authors.
import os.path as osp

from mmengine.config import Config

import mmfgm
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


def read_config(name: str) -> Config:
    """Read the config that a name means, see :func:`config_path`.

    Raises:
        UsageError: If there is no such file, or it cannot be parsed.
    """
    path = config_path(name)
    try:
        # a config is a program of the user's: whatever it raises is about the config
        return Config.fromfile(path)
    except Exception as e:
        raise UsageError(f'config {name!r} cannot be read: {type(e).__name__}: {e}') from e
