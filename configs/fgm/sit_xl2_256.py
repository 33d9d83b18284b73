_base_ = [
    '../_base_/models/sit_fgm.py',
    '../_base_/datasets/imagenet256_conditions.py',
    '../_base_/schedules/sit_fgm.py',
    '../_base_/evaluation/imagenet256_fid.py',
    '../_base_/default_runtime.py',
]

strategy = dict(precision='auto')
evaluations = dict(fid=dict(sampling=dict(network='generator_ema')))
default_hooks = dict(
    checkpoint=dict(interval=1000, max_keep_ckpts=3, save_best='fid/fid', rule='less'),
    samples=dict(
        type='SampleHook',
        interval=1000,
        dataset=dict(type='GenerationDataset', num_samples=16, num_classes='${num_classes}'),
        nrow=4,
        samplings={
            'teacher, 50 NFE': dict(network='teacher', nfe=50, guidance=1.5, guidance_channels=3),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
)
