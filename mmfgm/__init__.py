# Copyright (c) mmfgm authors.
"""mmfgm: one-step generators from flow-matching models, by Flow Generator Matching."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .lazy import absent
from .version import __version__

# upstream package -> the maintained continuation that owns the same import name
_CONTINUATIONS = {
    'mmengine': 'onedl-mmengine',
    'mmengine-lite': 'onedl-mmengine',
    'mmcv': 'onedl-mmcv',
    'mmcv-lite': 'onedl-mmcv',
    'mmdet': 'onedl-mmdetection',
}


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _check_distributions() -> None:
    """Refuse an environment in which an upstream package took the place of its continuation.

    Raises:
        ImportError: Names both packages and how to repair it.
    """
    for upstream, onedl in _CONTINUATIONS.items():
        if _installed(upstream):
            raise ImportError(
                f'the package {upstream!r} is installed; mmfgm needs {onedl!r}, its maintained'
                ' continuation under the same import name, and one overwrites the files of the'
                f' other. Run: pip uninstall -y {upstream} {onedl} && pip install {onedl}'
            )


_CONFIG_UTILS = 'mmengine.config.utils'
_OPTIMIZERS = 'mmengine.optim.optimizer.builder'
Execute = Callable[[ModuleType], None]


def _announce(config_utils: ModuleType) -> None:
    """Let ``_base_ = 'mmfgm::fgm/digits.py'`` find the configs inside the package."""
    config_utils.MODULE2PACKAGE['mmfgm'] = 'mmfgm'


def _execute_and_announce(execute: Execute, config_utils: ModuleType) -> None:
    execute(config_utils)
    _announce(config_utils)


def _execute_alone(execute: Execute, optimizers: ModuleType) -> None:
    """MMEngine imports transformers, which imports peft, for Adafactor alone: a part of the time
    that every training needs to start. PerNetworkConstructor makes up for it."""
    with absent('transformers'):
        execute(optimizers)


class _WhenImported(MetaPathFinder):
    """Changes a module of MMEngine as it is imported, whoever imports it first.

    Importing MMEngine for it would take seconds that a command's ``--help`` does not need.
    """

    def __init__(self, name: str, change: Callable[[Execute, ModuleType], None]):
        self.name = name
        self.change = change

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)
        execute = partial(self.change, spec.loader.exec_module)
        spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


_check_distributions()
if _CONFIG_UTILS in sys.modules:
    _announce(sys.modules[_CONFIG_UTILS])
else:
    sys.meta_path.insert(0, _WhenImported(_CONFIG_UTILS, _execute_and_announce))
if _OPTIMIZERS not in sys.modules:
    sys.meta_path.insert(0, _WhenImported(_OPTIMIZERS, _execute_alone))

__all__ = ['__version__']
