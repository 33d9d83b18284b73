# Consistency Flow Matching (Yang et al., 2024) from scratch, with the values of the authors' code:
# 100,000 iterations of flow matching, then as many with the network itself as the target
_base_ = 'cifar10_uncond.py'

model = dict(
    type='ConsistencyFM',
    # the network's two calls in an iteration must be the same function
    network=dict(unet=dict(dropout=0.0)),
    loss=dict(type='VelocityConsistencyLoss', segments=2, delta=1e-3, boundary=0.1, alpha=1e-5),
    target='network',
    start=100000,
    ema=dict(_delete_=True, network_ema=0.999999),
)
train_cfg = dict(max_iters=200000)
# their loss is half a sum over 3,072 numbers: their eps of 1e-8 and clip of 1, over 1,536
optim_wrapper = dict(
    network=dict(
        optimizer=dict(lr=2e-4, betas=(0.9, 0.999), eps=6.5e-12),
        clip_grad=dict(max_norm=6.5e-4),
    )
)
param_scheduler = dict(
    network=[dict(type='LinearLR', start_factor=2e-4, by_epoch=False, begin=0, end=5000)]
)
evaluations = dict(fid=dict(interval=20000, sampling=dict(nfe=2)))
default_hooks = dict(
    checkpoint=dict(interval=5000),
    samples=dict(
        interval=10000,
        samplings=dict(_delete_=True, **{'2 NFE': dict(network='network_ema', nfe=2)}),
    ),
)
