# 2-D toys keep L_1 (Section 5.1): the full loss, whose gradient is exact
model = dict(
    type='FGM',
    network=dict(type='AdaLNMLP', event_shape=(2,), width=128, depth=3, embed_dim=64),
    generator=dict(type='OneStepGenerator', t_star=1.0),
    loss=dict(type='FGMLoss', l1_weight=1.0),
    fm_time_sampler=dict(type='Uniform'),
    fgm_time_sampler=dict(type='Uniform'),
    ema=dict(generator_ema=0.999),
)
