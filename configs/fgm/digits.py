_base_ = [
    '../_base_/models/digits_mlp.py',
    '../_base_/evaluation/digits.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='FGM',
    teacher=dict(checkpoint='work_dirs/reflow/digits', prefix='network_ema'),
    # c_in z stands for x_t at t*: the generator starts as one denoising step of the teacher from
    # there
    generator=dict(type='OneStepGenerator', t_star=0.8, c_skip=0.8, c_in=0.8),
    # L_2 alone, as the paper does on images (Section 5.1)
    loss=dict(type='FGMLoss', l1_weight=0.0),
    # more noise than in pre-training, most of all for the generator
    fm_time_sampler=dict(type='LogitNormal', mean=0.5, std=1.4),
    fgm_time_sampler=dict(type='LogitNormal', mean=1.0, std=1.4),
    ema=dict(generator_ema=0.995),
)
train_dataloader = dict(
    batch_size=256,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='ConditionDataset', num_classes='${num_classes}'),
)
train_cfg = dict(type='AlternatingTrainLoop', max_iters=2400, online_updates=1, share_samples=False)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    online=dict(optimizer=dict(type='Adam', lr=4e-3, betas=(0.0, 0.999), fused=True)),
    generator=dict(optimizer=dict(type='Adam', lr=2e-3, betas=(0.0, 0.999), fused=True)),
)
param_scheduler = dict(
    online=[dict(type='LinearLR', start_factor=1.0, end_factor=0.1, by_epoch=False)],
    generator=[dict(type='LinearLR', start_factor=1.0, end_factor=0.0, by_epoch=False)],
)
evaluations = dict(fd=dict(interval=600, sampling=dict(network='generator_ema')))
default_hooks = dict(
    checkpoint=dict(interval=600, save_best='fd/fd', rule='less'),
    samples=dict(
        type='SampleHook',
        interval=600,
        dataset=dict(type='GenerationDataset', num_samples=100, num_classes='${num_classes}'),
        samplings={
            'teacher, 50 NFE': dict(network='teacher', nfe=50),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
)
