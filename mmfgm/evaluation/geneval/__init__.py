# Copyright (c) mmfgm authors.
from .judge import Verdict, judge
from .prompts import generate, read_metadata
from .summary import SCORES, summarize

__all__ = ['SCORES', 'Verdict', 'generate', 'judge', 'read_metadata', 'summarize']
