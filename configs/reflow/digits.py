_base_ = [
    '../_base_/models/digits_mlp.py',
    '../_base_/datasets/digits.py',
    '../_base_/evaluation/digits.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='FlowMatching',
    time_sampler=dict(type='LogitNormal', mean=0.0, std=1.4),
    ema=dict(network_ema=0.999),
)
train_cfg = dict(type='AlternatingTrainLoop', max_iters=3500)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    network=dict(optimizer=dict(type='Adam', lr=1e-3, betas=(0.9, 0.99), fused=True)),
)
param_scheduler = dict(network=[dict(type='CosineAnnealingLR', eta_min=0, by_epoch=False)])
evaluations = dict(fd=dict(sampling=dict(network='network_ema', nfe=50)))
default_hooks = dict(
    samples=dict(
        type='SampleHook',
        interval=1000,
        dataset=dict(type='GenerationDataset', num_samples=100, num_classes='${num_classes}'),
        samplings={'teacher, 50 NFE': dict(network='network_ema', nfe=50)},
    )
)
