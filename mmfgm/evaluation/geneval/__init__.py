# Copyright (c) mmfgm authors.
from .dataset import GenEvalPrompts
from .judge import Verdict, judge
from .metric import GenEval
from .pipelines import DiffusersPipeline
from .prompts import generate, read_metadata
from .scorer import Scorer
from .summary import SCORES, summarize

__all__ = [
    'DiffusersPipeline', 'GenEval', 'GenEvalPrompts', 'SCORES', 'Scorer', 'Verdict', 'generate', 'judge', 'read_metadata',
    'summarize'
]
