# Copyright (c) mmfgm authors.
"""The GPU memory that training a config takes, without weights, data or a GPU."""

from .activations import dummy_batch, kept_bytes
from .estimate import GIB, Memory, Plan, build_on_meta, estimate, table

__all__ = [
    'GIB',
    'Memory',
    'Plan',
    'build_on_meta',
    'dummy_batch',
    'estimate',
    'kept_bytes',
    'table',
]
