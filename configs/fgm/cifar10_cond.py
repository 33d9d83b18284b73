_base_ = 'cifar10_uncond.py'

model = dict(
    network=dict(unet=dict(label_dim=10)), teacher=dict(checkpoint='work_dirs/reflow/cifar10_cond')
)
train_dataloader = dict(dataset=dict(num_classes=10))
evaluations = dict(fid=dict(dataset=dict(num_classes=10)))
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100, num_classes=10)))
