train_cfg = dict(type='AlternatingTrainLoop', max_iters=10000)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    network=dict(optimizer=dict(type='Adam', lr=1e-3, betas=(0.9, 0.99), fused=True)),
)
param_scheduler = dict(network=[dict(type='CosineAnnealingLR', eta_min=0, by_epoch=False)])
