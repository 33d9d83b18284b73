# Copyright (c) mmfgm authors.
from .colors import ClipColors
from .dataset import GenEvalPrompts
from .detectors.base import Detected, Mask2FormerDetector
from .detectors.mmdet_detector import MMDetMask2Former
from .detectors.transformers_detector import TransformersMask2Former
from .judging.judge import Verdict, judge
from .judging.prompts import generate, read_metadata
from .judging.summary import SCORES, summarize
from .metric import GenEval
from .pipelines import DiffusersPipeline
from .scorer import Scorer

__all__ = [
    'SCORES',
    'ClipColors',
    'Detected',
    'DiffusersPipeline',
    'GenEval',
    'GenEvalPrompts',
    'MMDetMask2Former',
    'Mask2FormerDetector',
    'Scorer',
    'TransformersMask2Former',
    'Verdict',
    'generate',
    'judge',
    'read_metadata',
    'summarize',
]
