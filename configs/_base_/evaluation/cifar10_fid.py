# FID of 50,000 samples against the 50,000 training images, one run with fixed seeds
evaluations = dict(
    fid=dict(
        interval=2000,
        dataset=dict(type='GenerationDataset', num_samples=50000, num_classes='${num_classes}'),
        batch_size=250,
        metrics=dict(
            fid=dict(
                type='FID',
                reference=dict(type='CIFAR10', data_root='data/cifar10', labels=False),
                feature=dict(type='InceptionV3'),
            )
        ),
    )
)
