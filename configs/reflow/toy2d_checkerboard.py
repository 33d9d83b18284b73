_base_ = [
    '../_base_/models/toy2d_flow_matching.py',
    '../_base_/datasets/toy2d_checkerboard.py',
    '../_base_/schedules/toy2d_reflow.py',
    '../_base_/evaluation/toy2d_checkerboard.py',
    '../_base_/toy2d_reflow_runtime.py',
]

evaluations = dict(sw2=dict(sampling=dict(network='network_ema', nfe=100)))
