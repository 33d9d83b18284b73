_base_ = [
    '../_base_/models/fashion_unet.py',
    '../_base_/datasets/fashion.py',
    '../_base_/evaluation/fashion.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='FlowMatching',
    time_sampler=dict(type='LogitNormal', mean=0.0, std=1.4),
    ema=dict(network_ema=0.999),
)
train_cfg = dict(type='AlternatingTrainLoop', max_iters=8000)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    network=dict(optimizer=dict(type='Adam', lr=1e-3, betas=(0.9, 0.99), fused=True)),
)
# constant after a warm-up, as EDM's: the average stands for the decay, so that it can be used, or
# training be prolonged, at any iteration
param_scheduler = dict(
    network=[dict(type='LinearLR', start_factor=0.01, begin=0, end=100, by_epoch=False)]
)
# many evaluations of the network each: measured by tools/test.py afterwards
evaluations = dict(fd=dict(interval=0, sampling=dict(network='network_ema', nfe=50)))
default_hooks = dict(
    checkpoint=dict(interval=100),
    samples=dict(
        type='SampleHook',
        interval=1000,
        dataset=dict(type='GenerationDataset', num_samples=100, num_classes='${num_classes}'),
        samplings={'teacher, 50 NFE': dict(network='network_ema', nfe=50)},
    ),
)
