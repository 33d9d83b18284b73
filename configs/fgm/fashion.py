_base_ = [
    '../_base_/models/fashion_unet.py',
    '../_base_/evaluation/fashion.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='FGM',
    teacher=dict(checkpoint='mmfgm::assets/fashion/teacher.safetensors', prefix=''),
    # the recipe of digits: one denoising step of the teacher from t* to begin with, L_2 alone, and
    # more noise than in pre-training, most of all for the generator
    generator=dict(type='OneStepGenerator', t_star=0.8, c_skip=0.8, c_in=0.8),
    loss=dict(type='FGMLoss', l1_weight=0.0),
    fm_time_sampler=dict(type='LogitNormal', mean=0.5, std=1.4),
    fgm_time_sampler=dict(type='LogitNormal', mean=1.0, std=1.4),
    ema=dict(generator_ema=0.995),
)
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='ConditionDataset', num_classes='${num_classes}'),
)
train_cfg = dict(type='AlternatingTrainLoop', max_iters=800, online_updates=1, share_samples=False)
# a quarter of digits' rates, as the teacher's is that of EDM's U-Net
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    online=dict(optimizer=dict(type='Adam', lr=1e-3, betas=(0.0, 0.999), fused=True)),
    generator=dict(optimizer=dict(type='Adam', lr=5e-4, betas=(0.0, 0.999), fused=True)),
)
param_scheduler = dict(
    online=[dict(type='LinearLR', start_factor=1.0, end_factor=0.1, by_epoch=False)],
    generator=[dict(type='LinearLR', start_factor=1.0, end_factor=0.0, by_epoch=False)],
)
evaluations = dict(fd=dict(sampling=dict(network='generator_ema')))
default_hooks = dict(
    checkpoint=dict(interval=100, save_best='fd/fd', rule='less'),
    samples=dict(
        type='SampleHook',
        interval=400,
        dataset=dict(type='GenerationDataset', num_samples=100, num_classes='${num_classes}'),
        samplings={
            'teacher, 50 NFE': dict(network='teacher', nfe=50),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
)
