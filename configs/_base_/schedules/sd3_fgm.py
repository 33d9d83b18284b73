# B.2: Adam at 5e-6 with betas (0, 0.999) and eps 1e-6; without a first moment, which beta_1 = 0
# makes the gradient itself
train_cfg = dict(type='AlternatingTrainLoop', max_iters=20000, online_updates=1, accumulation=6)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    online=dict(optimizer=dict(type='MomentumFreeAdam', lr=5e-6, betas=(0.0, 0.999), eps=1e-6)),
    discriminator=dict(
        optimizer=dict(type='MomentumFreeAdam', lr=5e-6, betas=(0.0, 0.999), eps=1e-6)
    ),
    generator=dict(optimizer=dict(type='MomentumFreeAdam', lr=5e-6, betas=(0.0, 0.999), eps=1e-6)),
)
