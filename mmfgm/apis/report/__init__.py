# Copyright (c) mmfgm authors.
"""Reports of runs: :mod:`.data` reads work dirs, :mod:`.curves` draws, :mod:`.page` writes HTML."""

from typing import Any

__all__ = ['write_report']


def __getattr__(name: str) -> Any:
    # matplotlib is imported only where something is drawn
    if name == 'write_report':
        from .report import write_report

        return write_report
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
