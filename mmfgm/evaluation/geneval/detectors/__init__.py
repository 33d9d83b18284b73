# Copyright (c) mmfgm authors.
"""Mask2Former, as the reference runs it and as transformers does."""

from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'base': ['Detected', 'Mask2FormerDetector'],
        'mmdet_detector': ['MMDetMask2Former'],
        'transformers_detector': ['TransformersMask2Former'],
    },
)
