# the learning rate and betas of the paper's transformer, SD3 (B.2), for the images of its CIFAR-10
# runs: 20,000 kimg, here at a batch of 256
train_cfg = dict(type='AlternatingTrainLoop', max_iters=78125, online_updates=1)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    online=dict(optimizer=dict(type='MomentumFreeAdam', lr=5e-6, betas=(0.0, 0.999))),
    generator=dict(optimizer=dict(type='MomentumFreeAdam', lr=5e-6, betas=(0.0, 0.999))),
)
