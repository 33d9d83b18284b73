# DMD2 (Yin et al., 2024) without its GAN: its gradient, its times, five online updates a cycle
_base_ = 'cifar10_uncond.py'

num_classes = 10
model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/cifar10_cond'),
    loss=dict(_delete_=True, type='DMDLoss'),
    fgm_time_sampler=dict(_delete_=True, type='Uniform', low=0.02, high=0.98),
)
train_cfg = dict(online_updates=5)
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100)))
