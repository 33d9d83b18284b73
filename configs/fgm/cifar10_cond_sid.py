# SiD's alpha = 1.2 (Zhou et al., 2024): l1_weight = 2 (1 - alpha)
_base_ = 'cifar10_uncond.py'

num_classes = 10
model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/cifar10_cond'),
    loss=dict(l1_weight=-0.4),
)
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100)))
