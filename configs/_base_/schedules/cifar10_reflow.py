# Table 4: 20,000 kimg at a batch of 512
train_cfg = dict(type='AlternatingTrainLoop', max_iters=39063)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    network=dict(optimizer=dict(type='Adam', lr=2e-5, betas=(0.0, 0.999), fused=True)),
)
