_base_ = [
    '../_base_/models/cifar10_fgm.py',
    '../_base_/datasets/cifar10_conditions.py',
    '../_base_/schedules/cifar10_fgm.py',
    '../_base_/evaluation/cifar10_fid.py',
    '../_base_/default_runtime.py',
]

model = dict(teacher=dict(checkpoint='work_dirs/reflow/cifar10_uncond', prefix='network_ema'))
strategy = dict(precision='tf32')
evaluations = dict(fid=dict(sampling=dict(network='generator_ema')))
default_hooks = dict(
    checkpoint=dict(interval=1000, max_keep_ckpts=3, save_best='fid/fid', rule='less'),
    samples=dict(
        type='SampleHook',
        interval=1000,
        dataset=dict(type='GenerationDataset', num_samples=64, num_classes='${num_classes}'),
        nrow=8,
        samplings={
            'teacher, 50 NFE': dict(network='teacher', nfe=50),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
)
