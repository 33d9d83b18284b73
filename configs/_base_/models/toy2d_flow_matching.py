model = dict(
    type='FlowMatching',
    network=dict(type='AdaLNMLP', event_shape=(2,), width=128, depth=3, embed_dim=64),
    time_sampler=dict(type='Uniform'),
    ema=dict(network_ema=0.999),
)
