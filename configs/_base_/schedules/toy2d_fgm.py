train_dataloader = dict(
    batch_size=512,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=False),
    dataset=dict(type='ConditionDataset'),
)
train_cfg = dict(type='AlternatingTrainLoop', max_iters=10000, online_updates=1)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    online=dict(optimizer=dict(type='Adam', lr=1e-3, betas=(0.0, 0.999), fused=True)),
    generator=dict(optimizer=dict(type='Adam', lr=2e-4, betas=(0.0, 0.999), fused=True)),
)
param_scheduler = dict(
    online=[dict(type='LinearLR', start_factor=1.0, end_factor=0.1, by_epoch=False)],
    generator=[dict(type='LinearLR', start_factor=1.0, end_factor=0.0, by_epoch=False)],
)
