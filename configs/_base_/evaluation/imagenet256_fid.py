# the protocol of ADM (Dhariwal & Nichol, 2021): 50,000 samples, as many of each class, against the
# moments of the whole training set; precision and recall against the 10,000 images in the same file
evaluations = dict(
    fid=dict(
        interval=5000,
        dataset=dict(type='GenerationDataset', num_samples=50000, num_classes='${num_classes}'),
        batch_size=64,
        metrics=dict(
            fid=dict(type='FID', reference='data/imagenet256/VIRTUAL_imagenet256_labeled.npz'),
            isc=dict(type='InceptionScore'),
            prc=dict(
                type='PrecisionRecall',
                reference='data/imagenet256/VIRTUAL_imagenet256_labeled.npz',
            ),
        ),
    )
)
