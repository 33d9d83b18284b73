# Copyright (c) mmfgm authors.
from .colors import ClipColors
from .dataset import GenEvalPrompts
from .detector import Detected, Mask2FormerDetector
from .judge import Verdict, judge
from .metric import GenEval
from .mmdet_detector import MMDetMask2Former
from .pipelines import DiffusersPipeline
from .prompts import generate, read_metadata
from .scorer import Scorer
from .summary import SCORES, summarize
from .transformers_detector import TransformersMask2Former

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
