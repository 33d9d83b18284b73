# Table 4: 20,000 kimg at a batch of 512; one forward of the generator serves both phases
train_cfg = dict(type='AlternatingTrainLoop', max_iters=39063, online_updates=1, share_samples=True)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    online=dict(optimizer=dict(type='Adam', lr=2e-5, betas=(0.0, 0.999), fused=True)),
    generator=dict(optimizer=dict(type='Adam', lr=2e-5, betas=(0.0, 0.999), fused=True)),
)
