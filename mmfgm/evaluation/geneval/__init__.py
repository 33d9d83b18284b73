# Copyright (c) mmfgm authors.
from .judge import Verdict, judge
from .prompts import generate, read_metadata
from .summary import summarize

__all__ = ['Verdict', 'generate', 'judge', 'read_metadata', 'summarize']
