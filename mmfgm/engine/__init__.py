# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'adam': ['MomentumFreeAdam'],
        'checkpoint': ['CheckpointMixin'],
        'hooks': [
            'CheckpointHook',
            'EvaluationHook',
            'MonitorHook',
            'NetworkEMAHook',
            'PreemptionHook',
            'RNGStateHook',
            'SampleHook',
        ],
        'loops': ['AlternatingTrainLoop'],
        'optim': ['NetworkOptimWrapper', 'PerNetworkConstructor'],
        'runner': ['FlowRunner', 'check_config'],
        'strategies': [
            'DDPStrategy',
            'FSDP2Strategy',
            'PRECISIONS',
            'SingleDeviceStrategy',
            'default_strategy',
        ],
    },
)
