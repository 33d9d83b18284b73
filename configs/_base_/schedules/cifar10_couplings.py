# Liu et al. (2022): 300,000 iterations from the teacher's weights
train_cfg = dict(type='AlternatingTrainLoop', max_iters=300000)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    network=dict(
        optimizer=dict(type='Adam', lr=2e-4, betas=(0.9, 0.999), fused=True),
        clip_grad=dict(max_norm=1.0),
    ),
)
param_scheduler = dict(
    network=[dict(type='LinearLR', start_factor=2e-4, by_epoch=False, begin=0, end=5000)]
)
