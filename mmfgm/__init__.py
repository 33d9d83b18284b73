# Copyright (c) mmfgm authors.
"""mmfgm: one-step generators from flow-matching models, by Flow Generator Matching."""

from importlib import metadata

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


_check_distributions()

from mmengine.config import utils as _config_utils

# lets `_base_ = 'mmfgm::fgm/digits.py'` find the configs inside the package
_config_utils.MODULE2PACKAGE['mmfgm'] = 'mmfgm'

__all__ = ['__version__']
