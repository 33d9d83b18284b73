# the exact loss, L_1 + L_2 (4.10)
_base_ = 'digits.py'

model = dict(loss=dict(l1_weight=1.0))
