# Frechet distance on pixels: 10,000 samples with balanced labels against all 1,797 digits
evaluations = dict(
    fd=dict(
        interval=1000,
        dataset=dict(type='GenerationDataset', num_samples=10000, num_classes='${num_classes}'),
        batch_size=1000,
        metrics=dict(
            fd=dict(
                type='FrechetDistance', reference=dict(type='Digits'), feature=dict(type='Pixels')
            )
        ),
    )
)
