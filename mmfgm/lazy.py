# Copyright (c) mmfgm authors.
"""Packages whose names are imported when they are first used (PEP 562).

A command that prints its help, or a script that needs only the losses, does not pay for torch,
diffusers or MMEngine that way.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def attach(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package's ``__init__`` assigns to ``__getattr__``, ``__dir__`` and ``__all__``.

    Args:
        package (str): The package's ``__name__``.
        names (Mapping[str, Sequence[str]]): Submodule to the public names that it defines.
    """
    home = {name: module for module, public in names.items() for name in public}
    # importing a submodule makes it an attribute of its package, in place of such a name
    assert not home.keys() & names.keys(), f'names of {package} that are its submodules too'
    public = sorted(home)

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return getattr(importlib.import_module(f'{package}.{home[name]}'), name)

    def __dir__() -> list[str]:
        return public

    return __getattr__, __dir__, public


@contextmanager
def absent(package: str) -> Iterator[None]:
    """While this lasts, importing ``package`` fails, unless it was imported before."""
    known = package in sys.modules
    if not known:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not known:
            del sys.modules[package]
