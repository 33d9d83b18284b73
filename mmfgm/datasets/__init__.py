# Copyright (c) mmfgm authors.
from .base import ConditionDataset, GenerationDataset, PaddedSampler, TensorDataset, collate
from .digits import Digits
from .toys import Toy2D

__all__ = ['ConditionDataset', 'Digits', 'GenerationDataset', 'PaddedSampler', 'TensorDataset', 'Toy2D', 'collate']
