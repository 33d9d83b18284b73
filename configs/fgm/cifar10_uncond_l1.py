# ablation C.2: the full loss L_1 + L_2, which the paper finds to corrupt images quickly
_base_ = 'cifar10_uncond.py'

model = dict(loss=dict(l1_weight=1.0))
