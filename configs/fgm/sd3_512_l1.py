# ablation C.2: L_1 + L_2; the paper begins with an early checkpoint of a run without L_1
# (load_from=...)
_base_ = 'sd3_512.py'

model = dict(loss=dict(l1_weight=1.0))
