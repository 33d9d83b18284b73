# Copyright (c) mmfgm authors.
from .adam import MomentumFreeAdam
from .checkpoint import CheckpointMixin
from .hooks import (
    EXIT_PREEMPTED,
    CheckpointHook,
    EvaluationHook,
    MonitorHook,
    NetworkEMAHook,
    NonFiniteError,
    PreemptionHook,
    RNGStateHook,
    SampleHook,
)
from .loops import AlternatingTrainLoop
from .optim import NetworkOptimWrapper, PerNetworkConstructor
from .runner import FlowRunner
from .strategies import DDPStrategy, FSDP2Strategy, SingleDeviceStrategy, init_processes

__all__ = [
    'EXIT_PREEMPTED',
    'AlternatingTrainLoop',
    'CheckpointHook',
    'CheckpointMixin',
    'DDPStrategy',
    'EvaluationHook',
    'FSDP2Strategy',
    'FlowRunner',
    'MomentumFreeAdam',
    'MonitorHook',
    'NetworkEMAHook',
    'NetworkOptimWrapper',
    'NonFiniteError',
    'PerNetworkConstructor',
    'PreemptionHook',
    'RNGStateHook',
    'SampleHook',
    'SingleDeviceStrategy',
    'init_processes',
]
