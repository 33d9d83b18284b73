# Copyright (c) mmfgm authors.
from .checkpoint import CheckpointHook
from .ema import NetworkEMAHook
from .evaluation import EvaluationHook, SampleHook
from .monitor import MonitorHook, NonFiniteError
from .preemption import EXIT_PREEMPTED, PreemptionHook
from .rng import RNGStateHook, preserve_rng

__all__ = [
    'EXIT_PREEMPTED',
    'CheckpointHook',
    'EvaluationHook',
    'MonitorHook',
    'NetworkEMAHook',
    'NonFiniteError',
    'PreemptionHook',
    'RNGStateHook',
    'SampleHook',
    'preserve_rng',
]
