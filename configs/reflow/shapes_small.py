# shapes for two CPU cores: a quarter of the width, two thirds of the depth, an eighth of the
# samples
_base_ = 'shapes.py'

model = dict(
    network=dict(config=dict(num_layers=4, num_attention_heads=4, caption_projection_dim=128))
)
train_dataloader = dict(batch_size=64, num_workers=1)
train_cfg = dict(max_iters=9000)
optim_wrapper = dict(network=dict(optimizer=dict(lr=1e-3)))
strategy = dict(precision='auto')
evaluations = dict(shapes=dict(interval=0))
default_hooks = dict(checkpoint=dict(interval=1000), samples=dict(interval=1500))
