# Copyright (c) mmfgm authors.
"""A training run rehearsed at full size, without weights, data or a GPU."""

from .counting import Kind, Memory, Message, Traffic, Work
from .gpus import GPUS, gpu_named
from .pretending import bare_runner, feed
from .rehearse import COLUMNS, PhaseCost, Rehearsal, markdown_row, rehearse, report
from .shapes import build_without_weights, dummy_batch, known_architectures, without_weights

__all__ = [
    'COLUMNS',
    'GPUS',
    'Kind',
    'Memory',
    'Message',
    'PhaseCost',
    'Rehearsal',
    'Traffic',
    'Work',
    'bare_runner',
    'build_without_weights',
    'dummy_batch',
    'feed',
    'gpu_named',
    'known_architectures',
    'markdown_row',
    'rehearse',
    'report',
    'without_weights',
]
