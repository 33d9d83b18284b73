_base_ = [
    '../_base_/models/shapes_fgm.py',
    '../_base_/datasets/shapes.py',
    '../_base_/evaluation/shapes.py',
    '../_base_/default_runtime.py',
]

model = dict(teacher=dict(checkpoint='work_dirs/reflow/shapes', prefix='network_ema'))
# with a kind that has no score: "a red circle left of a blue square"
_kinds = (
    'single_object',
    'two_object',
    'counting',
    'colors',
    'position',
    'color_attr',
    'color_position',
)
train_dataloader = dict(
    batch_size=256,
    num_workers=2,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='WithReal',
        conditions=dict(
            type='Shapes',
            size='${image_size}',
            length=200000,
            images=False,
            tags=_kinds,
            encoder=dict(max_words='${max_words}'),
            world='${world}',
        ),
        real=dict(
            type='Shapes',
            size='${image_size}',
            length=200000,
            seed=2,
            tags=_kinds,
            encoder=dict(max_words='${max_words}'),
            world='${world}',
        ),
    ),
)
del _kinds
train_cfg = dict(type='AlternatingTrainLoop', max_iters=10000, online_updates=1, share_samples=True)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    online=dict(optimizer=dict(type='Adam', lr=2e-4, betas=(0.0, 0.999), fused=True)),
    discriminator=dict(optimizer=dict(type='Adam', lr=2e-4, betas=(0.0, 0.999), fused=True)),
    generator=dict(optimizer=dict(type='Adam', lr=1e-4, betas=(0.0, 0.999), fused=True)),
)
param_scheduler = dict(
    online=[dict(type='LinearLR', start_factor=1.0, end_factor=0.1, by_epoch=False)],
    discriminator=[dict(type='LinearLR', start_factor=1.0, end_factor=0.1, by_epoch=False)],
    generator=[dict(type='LinearLR', start_factor=1.0, end_factor=0.0, by_epoch=False)],
)
evaluations = dict(shapes=dict(sampling=dict(network='generator_ema')))
default_hooks = dict(
    samples=dict(
        type='SampleHook',
        interval=1000,
        dataset=dict(
            type='ShapePrompts',
            num_samples=60,
            encoder=dict(max_words='${max_words}'),
            world='${world}',
        ),
        samplings={
            'teacher, 50 NFE': dict(network='teacher', nfe=50, guidance=2.0),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
    watch=dict(
        type='WatchHook',
        interval=200,
        dataset=dict(
            type='ShapePrompts',
            num_samples=1200,
            encoder=dict(max_words='${max_words}'),
            world='${world}',
        ),
    ),
)
