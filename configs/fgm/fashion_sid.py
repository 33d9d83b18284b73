# SiD (Zhou et al., 2024) with its alpha = 1.2: l1_weight = 2 - 2 alpha
_base_ = 'fashion.py'

model = dict(loss=dict(l1_weight=-0.4, weight='sid'))
