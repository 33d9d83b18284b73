_base_ = [
    '../_base_/models/shapes_reflow.py',
    '../_base_/datasets/shapes.py',
    '../_base_/evaluation/shapes.py',
    '../_base_/default_runtime.py',
]

train_dataloader = dict(
    batch_size=256,
    num_workers=2,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='Shapes',
        size='${image_size}',
        length=200000,
        # with a kind that has no score: "a red circle left of a blue square"
        tags=(
            'single_object',
            'two_object',
            'counting',
            'colors',
            'position',
            'color_attr',
            'color_position',
        ),
        encoder=dict(max_words='${max_words}'),
        world='${world}',
    ),
)
train_cfg = dict(type='AlternatingTrainLoop', max_iters=20000)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    network=dict(
        optimizer=dict(type='Adam', lr=5e-4, betas=(0.9, 0.99), fused=True),
        clip_grad=dict(max_norm=1.0),
    ),
)
param_scheduler = dict(network=[dict(type='CosineAnnealingLR', eta_min=0, by_epoch=False)])
evaluations = dict(
    shapes=dict(interval=5000, sampling=dict(network='network_ema', nfe=50, guidance=2.0))
)
default_hooks = dict(
    samples=dict(
        type='SampleHook',
        interval=2000,
        dataset=dict(
            type='ShapePrompts',
            num_samples=60,
            encoder=dict(max_words='${max_words}'),
            world='${world}',
        ),
        samplings={'teacher, 50 NFE': dict(network='network_ema', nfe=50, guidance=2.0)},
    )
)
