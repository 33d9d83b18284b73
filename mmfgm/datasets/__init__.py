# Copyright (c) mmfgm authors.
from .base import (
    ConditionDataset,
    GenerationDataset,
    PaddedSampler,
    TensorDataset,
    WithReal,
    collate,
)
from .cached import CachedLatents, CachedPrompts, CachedPromptSamples, verify_cache
from .digits import Digits
from .images import CIFAR10, ImageFolder
from .shapes import ShapePrompts, Shapes, WordEncoder, ZeroPrompt
from .toys import Toy2D

__all__ = [
    'CIFAR10',
    'CachedLatents',
    'CachedPromptSamples',
    'CachedPrompts',
    'ConditionDataset',
    'Digits',
    'GenerationDataset',
    'ImageFolder',
    'PaddedSampler',
    'ShapePrompts',
    'Shapes',
    'TensorDataset',
    'Toy2D',
    'WithReal',
    'WordEncoder',
    'ZeroPrompt',
    'collate',
    'verify_cache',
]
