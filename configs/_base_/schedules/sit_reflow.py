# Ma et al. (2024): Adam at a constant 1e-4; the 400,000 iterations of their comparisons, of the
# 7 M that the published network had
train_cfg = dict(type='AlternatingTrainLoop', max_iters=400000)
optim_wrapper = dict(
    constructor='PerNetworkConstructor',
    network=dict(optimizer=dict(type='Adam', lr=1e-4, betas=(0.9, 0.999), fused=True)),
)
