# on features of a small classifier: Frechet distance to the 60,000 training images, precision and
# recall against the 10,000 test images, and how often the classifier sees the class asked for
_feature = dict(type='ClassifierFeatures', weights='mmfgm::assets/fashion/classifier.safetensors')
evaluations = dict(
    fd=dict(
        interval=500,
        dataset=dict(type='GenerationDataset', num_samples=5000, num_classes='${num_classes}'),
        batch_size=250,
        metrics=dict(
            fd=dict(
                type='FrechetDistance',
                reference=dict(type='FashionMNIST', data_root=None),
                feature=_feature,
            ),
            pr=dict(
                type='PrecisionRecall',
                reference=dict(type='FashionMNIST', data_root=None, train=False),
                feature=_feature,
            ),
            label=dict(type='LabelAgreement', feature=_feature),
        ),
    )
)
del _feature
