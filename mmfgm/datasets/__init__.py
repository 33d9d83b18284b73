# Copyright (c) mmfgm authors.
from .base import ConditionDataset, GenerationDataset, PaddedSampler, TensorDataset, collate
from .digits import Digits
from .images import CIFAR10, ImageFolder
from .toys import Toy2D

__all__ = ['CIFAR10', 'ConditionDataset', 'Digits', 'GenerationDataset', 'ImageFolder', 'PaddedSampler', 'TensorDataset',
           'Toy2D', 'collate']
