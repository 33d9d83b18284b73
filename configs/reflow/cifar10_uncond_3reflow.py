# 3-ReFlow: the same on pairs of 2-ReFlow
_base_ = 'cifar10_uncond_2reflow.py'

model = dict(teacher=dict(checkpoint='work_dirs/reflow/cifar10_uncond_2reflow'))
train_dataloader = dict(dataset=dict(path='data/couplings/cifar10_uncond_2reflow'))
