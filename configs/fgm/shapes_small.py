# shapes for two CPU cores, with the teacher of configs/reflow/shapes_small.py
_base_ = 'shapes.py'

model = dict(
    network=dict(config=dict(num_layers=4, num_attention_heads=4, caption_projection_dim=128)),
    teacher=dict(checkpoint='work_dirs/reflow/shapes_small'),
    ema=dict(generator_ema=0.995),
)
train_dataloader = dict(batch_size=64, num_workers=1)
train_cfg = dict(max_iters=1200)
optim_wrapper = dict(
    online=dict(optimizer=dict(lr=1e-3)),
    discriminator=dict(optimizer=dict(lr=1e-3)),
    generator=dict(optimizer=dict(lr=5e-4)),
)
strategy = dict(precision='auto')
evaluations = dict(shapes=dict(interval=200))
default_hooks = dict(
    checkpoint=dict(interval=200, save_best='shapes/score_overall', rule='greater'),
    samples=dict(interval=200),
)
