# Copyright (c) mmfgm authors.
"""Mask2Former, as the reference runs it and as transformers does."""

from .base import Detected, Mask2FormerDetector
from .mmdet_detector import MMDetMask2Former
from .transformers_detector import TransformersMask2Former

__all__ = ['Detected', 'MMDetMask2Former', 'Mask2FormerDetector', 'TransformersMask2Former']
