default_scope = 'mmfgm'
randomness = dict(seed=0, diff_rank_seed=True)
env_cfg = dict(dist_cfg=dict(backend='nccl'))
log_processor = dict(by_epoch=False, window_size=50)
visualizer = dict(
    type='Visualizer',
    vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    ema=dict(type='NetworkEMAHook'),
    monitor=dict(type='MonitorHook'),
    checkpoint=dict(type='CheckpointHook', interval=500),
    rng=dict(type='RNGStateHook'),
    preemption=dict(type='PreemptionHook'),
    evaluation=dict(type='EvaluationHook'),
)
