_base_ = 'default_runtime.py'

default_hooks = dict(
    logger=dict(interval=500),
    checkpoint=dict(interval=2000),
    samples=dict(
        type='SampleHook',
        interval=2000,
        dataset=dict(type='GenerationDataset', num_samples=10000),
        samplings={
            'teacher, 100 NFE': dict(network='teacher', nfe=100),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
)
