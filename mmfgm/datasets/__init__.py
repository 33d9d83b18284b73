# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'base': [
            'Batch',
            'ConditionDataset',
            'GenerationDataset',
            'PaddedSampler',
            'TensorDataset',
            'WithReal',
            'check_finite_batch',
            'collate',
            'item_seed',
        ],
        'cached': [
            'CachedLatents',
            'CachedPromptSamples',
            'CachedPrompts',
            'LABELS',
            'NULL',
            'checksums',
            'read_manifest',
            'verify_cache',
        ],
        'couplings': ['Couplings'],
        'digits': ['Digits'],
        'fashion': ['FashionMNIST'],
        'images': ['CIFAR10', 'ImageFolder', 'SUFFIXES', 'read_labels'],
        'shapes': [
            'COLORS',
            'SHAPES',
            'ShapePrompts',
            'Shapes',
            'WordEncoder',
            'ZeroPrompt',
            'coverage',
            'render',
        ],
        'toys': ['Toy2D'],
    },
)
