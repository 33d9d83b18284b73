# ablation C.1: x_0 = z - v(z, t*); the paper sweeps t_star over 0, 0.25, 0.5, 0.75 and 1
_base_ = 'sd3_512.py'

t_star = 0.75
model = dict(generator=dict(t_star='${t_star}', c_out=1.0, c_in=1.0))
