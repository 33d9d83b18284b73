# Copyright (c) mmfgm authors.
from .mlp import AdaLNMLP

__all__ = ['AdaLNMLP']
