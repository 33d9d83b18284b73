# Copyright (c) mmfgm authors.
"""What GenEval asks and how it decides, from boxes and colours alone: no network, no file."""

from .judge import Verdict, judge
from .prompts import generate, read_metadata, to_jsonl
from .summary import SCORES, summarize

__all__ = [
    'SCORES',
    'Verdict',
    'generate',
    'judge',
    'read_metadata',
    'summarize',
    'to_jsonl',
]
