# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'base': [
            'ConditionDataset',
            'GenerationDataset',
            'PaddedSampler',
            'TensorDataset',
            'WithReal',
            'collate',
        ],
        'cached': ['CachedLatents', 'CachedPrompts', 'CachedPromptSamples', 'verify_cache'],
        'digits': ['Digits'],
        'images': ['CIFAR10', 'ImageFolder'],
        'shapes': ['ShapePrompts', 'Shapes', 'WordEncoder', 'ZeroPrompt'],
        'toys': ['Toy2D'],
    },
)
