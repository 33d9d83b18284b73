# Copyright (c) mmfgm authors.
"""Images and verdicts on disk, in the layout of GenEval's reference."""

from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {'layout': ['read_results', 'scan_folder']})
