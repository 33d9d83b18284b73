_base_ = [
    '../_base_/models/cifar10_reflow.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/cifar10_reflow.py',
    '../_base_/evaluation/cifar10_fid.py',
    '../_base_/default_runtime.py',
]

strategy = dict(precision='tf32')
evaluations = dict(fid=dict(interval=5000, sampling=dict(network='network_ema', nfe=50)))
default_hooks = dict(
    checkpoint=dict(interval=1000, max_keep_ckpts=3, save_best='fid/fid', rule='less'),
    samples=dict(
        type='SampleHook',
        interval=2000,
        dataset=dict(type='GenerationDataset', num_samples=64, num_classes='${num_classes}'),
        nrow=8,
        samplings={'teacher, 50 NFE': dict(network='network_ema', nfe=50)},
    ),
)
