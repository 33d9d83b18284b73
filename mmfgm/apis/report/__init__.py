# Copyright (c) mmfgm authors.
"""Reports of runs: :mod:`.data` reads work dirs, :mod:`.curves` draws, :mod:`.page` writes HTML."""

from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {'report': ['write_report']})
