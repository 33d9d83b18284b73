# the weight of SiD-DiT (Zhou et al., 2025) on L_2: alpha = 1
_base_ = 'fashion.py'

model = dict(loss=dict(weight='sid_dit'))
