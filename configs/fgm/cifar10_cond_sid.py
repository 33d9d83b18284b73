# SiD's alpha = 1.2 (Zhou et al., 2024): l1_weight = 2 (1 - alpha)
_base_ = 'cifar10_cond.py'

model = dict(loss=dict(l1_weight=-0.4))
