# the gradient of DMD2 (Yin et al., 2024)
_base_ = 'fashion.py'

model = dict(loss=dict(_delete_=True, type='DMDLoss'))
