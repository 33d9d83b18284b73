_base_ = 'cifar10_uncond.py'

num_classes = 10
model = dict(teacher=dict(checkpoint='work_dirs/reflow/cifar10_cond'))
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100)))
