# Copyright (c) mmfgm authors.
from .family import SD3Family
from .folding import fold_generator
from .network import SD3
from .prompts import SD3TextEncoder

__all__ = ['SD3', 'SD3Family', 'SD3TextEncoder', 'fold_generator']
