# Diff-Instruct (Luo et al., 2023), which the paper's tables mark with a dagger; w = t keeps its
# gradient, (1 - t)^2 (u - v), finite at t = 0
_base_ = 'cifar10_uncond.py'

num_classes = 10
model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/cifar10_cond'),
    loss=dict(_delete_=True, type='DiffInstructLoss', weight=dict(t=1.0)),
)
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100)))
