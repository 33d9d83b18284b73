# the class-conditional teacher trained as EDM trains this network (Karras et al., 2022): Adam at
# 1e-3 with a warm-up over 10,000 kimg, 200,000 kimg at a batch of 512; Table 4's 2e-5 for 20,000
# kimg is doubtful from scratch
_base_ = 'cifar10_uncond.py'

num_classes = 10
train_cfg = dict(max_iters=390625)
optim_wrapper = dict(network=dict(optimizer=dict(lr=1e-3, betas=(0.9, 0.999))))
param_scheduler = dict(
    network=[dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=19531)]
)
# EDM's half-life of 500 kimg
model = dict(ema=dict(network_ema=0.9993))
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100)))
