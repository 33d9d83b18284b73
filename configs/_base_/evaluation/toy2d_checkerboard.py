# sliced Wasserstein-2 between 50,000 samples and 50,000 points that the teacher was not trained on
evaluations = dict(
    sw2=dict(
        interval=2500,
        dataset=dict(type='GenerationDataset', num_samples=50000),
        batch_size=10000,
        metrics=dict(
            sw2=dict(
                type='SlicedWasserstein',
                reference=dict(type='Toy2D', shape='checkerboard', size=50000, seed=1),
            )
        ),
    )
)
