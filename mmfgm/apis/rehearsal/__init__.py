# Copyright (c) mmfgm authors.
"""A training run rehearsed at full size, without weights, data or a GPU."""

from .counting import Kind, Memory, Traffic, Work
from .gpus import GPUS, gpu_named
from .rehearse import PhaseCost, Rehearsal, rehearse, report

__all__ = [
    'GPUS',
    'Kind',
    'Memory',
    'PhaseCost',
    'Rehearsal',
    'Traffic',
    'Work',
    'gpu_named',
    'rehearse',
    'report',
]
