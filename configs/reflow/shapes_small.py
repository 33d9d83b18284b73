# shapes for two CPU cores: 36 image tokens instead of 64, a quarter of the parameters, and no
# crosses, with outlines that 24 pixels can tell apart
_base_ = 'shapes.py'

image_size = 24
world = dict(
    shapes=('circle', 'square', 'triangle'),
    radii=((0.2, 0.3), (0.17, 0.21), (0.16, 0.19), (0.15, 0.17)),
)
model = dict(
    network=dict(
        config=dict(
            num_layers=4,
            num_attention_heads=4,
            caption_projection_dim=128,
            pos_embed_max_size=6,
        )
    ),
    # more noise than shapes: what is where is decided there
    time_sampler=dict(mean=0.5, std=1.2),
)
train_dataloader = dict(batch_size=64, num_workers=1)
train_cfg = dict(max_iters=12000)
optim_wrapper = dict(network=dict(optimizer=dict(lr=1e-3)))
# constant, and then down to nothing: training can be prolonged from any checkpoint before that
param_scheduler = dict(
    network=[
        dict(type='LinearLR', start_factor=0.01, begin=0, end=200, by_epoch=False),
        dict(
            type='LinearLR',
            start_factor=1.0,
            end_factor=0.0,
            begin=7500,
            end=12000,
            by_epoch=False,
        ),
    ]
)
# of a network this small, bf16 takes 1.4 times as long on a CPU that has it
strategy = dict(precision='fp32')
evaluations = dict(shapes=dict(interval=0))
default_hooks = dict(checkpoint=dict(interval=500), samples=dict(interval=2000))
