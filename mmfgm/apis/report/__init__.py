# Copyright (c) mmfgm authors.
"""Reports of runs: :mod:`.data` reads work dirs, :mod:`.curves` draws, :mod:`.page` writes HTML."""

from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__, {'curves': ['curves_png'], 'data': ['read_run'], 'report': ['write_report']}
)
