# Copyright (c) mmfgm authors.
"""A training run rehearsed at full size, without weights, data or a GPU."""

from .counting import Kind, Memory, Traffic, Work
from .gpus import GPUS, gpu_named
from .rehearse import COLUMNS, PhaseCost, Rehearsal, markdown_row, rehearse, report
from .shapes import dummy_batch, known_architectures, without_weights

__all__ = [
    'COLUMNS',
    'GPUS',
    'Kind',
    'Memory',
    'PhaseCost',
    'Rehearsal',
    'Traffic',
    'Work',
    'dummy_batch',
    'gpu_named',
    'known_architectures',
    'markdown_row',
    'rehearse',
    'report',
    'without_weights',
]
