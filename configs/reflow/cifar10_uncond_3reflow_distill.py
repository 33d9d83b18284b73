# 3-ReFlow (+distill): x_0 from the noise alone, on pairs of 3-ReFlow; at t = 1 the squared error of
# the velocity is that of x_0 = eps - v(eps, 1)
_base_ = 'cifar10_uncond_2reflow.py'

model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/cifar10_uncond_3reflow'),
    time_sampler=dict(low=1.0, high=1.0),
)
train_dataloader = dict(dataset=dict(path='data/couplings/cifar10_uncond_3reflow'))
