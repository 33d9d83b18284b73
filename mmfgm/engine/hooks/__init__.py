# Copyright (c) mmfgm authors.
from .checkpoint import CheckpointHook
from .ema import NetworkEMAHook
from .evaluation import EvaluationHook, SampleHook
from .monitor import MonitorHook
from .preemption import PreemptionHook
from .rng import RNGStateHook, preserve_rng
from .watch import WatchHook

__all__ = [
    'CheckpointHook',
    'EvaluationHook',
    'MonitorHook',
    'NetworkEMAHook',
    'PreemptionHook',
    'RNGStateHook',
    'SampleHook',
    'WatchHook',
    'preserve_rng',
]
