_base_ = [
    '../_base_/models/toy2d_fgm.py',
    '../_base_/schedules/toy2d_fgm.py',
    '../_base_/evaluation/toy2d_8gaussians.py',
    '../_base_/toy2d_fgm_runtime.py',
]

model = dict(teacher=dict(checkpoint='work_dirs/reflow/toy2d_8gaussians', prefix='network_ema'))
evaluations = dict(sw2=dict(interval=2000, sampling=dict(network='generator_ema')))
