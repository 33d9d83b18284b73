# 1.5 M parameters; smooth in t, so that the online network learns the flow of a moving generator
# quickly
num_classes = 10
model = dict(
    network=dict(
        type='AdaLNMLP',
        event_shape=(1, 8, 8),
        width=384,
        depth=4,
        embed_dim=48,
        num_classes='${num_classes}',
        max_frequency=4.0,
    )
)
