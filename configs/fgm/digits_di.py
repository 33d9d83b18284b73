# Diff-Instruct (Luo et al., 2023); w = t keeps its gradient, (1 - t)^2 (u - v), finite at t = 0
_base_ = 'digits.py'

model = dict(loss=dict(_delete_=True, type='DiffInstructLoss', weight=dict(t=1.0)))
