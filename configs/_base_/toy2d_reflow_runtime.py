_base_ = 'default_runtime.py'

default_hooks = dict(
    logger=dict(interval=500),
    checkpoint=dict(interval=2500),
    samples=dict(
        type='SampleHook',
        interval=2500,
        dataset=dict(type='GenerationDataset', num_samples=10000),
        samplings={'teacher, 100 NFE': dict(network='network_ema', nfe=100)},
    ),
)
