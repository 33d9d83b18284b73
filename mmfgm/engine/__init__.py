# Copyright (c) mmfgm authors.
from .adam import MomentumFreeAdam
from .checkpoint import CheckpointMixin
from .hooks import (
    CheckpointHook,
    EvaluationHook,
    MonitorHook,
    NetworkEMAHook,
    PreemptionHook,
    RNGStateHook,
    SampleHook,
)
from .loops import AlternatingTrainLoop
from .optim import NetworkOptimWrapper, PerNetworkConstructor
from .runner import FlowRunner
from .strategies import DDPStrategy, FSDP2Strategy, SingleDeviceStrategy

__all__ = [
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
    'PerNetworkConstructor',
    'PreemptionHook',
    'RNGStateHook',
    'SampleHook',
    'SingleDeviceStrategy',
]
