# Copyright (c) mmfgm authors.
"""Reads pickles from anybody without running anything in them: every class and function that a
pickle names becomes an inert stand-in, whose arguments and state the reader interprets itself.

To allow some real classes is not enough: the opcode BUILD sets attributes of whatever lies on the
stack, a class included, so that naming ``pathlib.PosixPath`` is enough to replace its ``unlink``
for the whole process.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO


class Inert:
    """Stands for a global of the file: keeps its arguments and its state, and does nothing with
    them."""

    # no __dict__: nothing in the file can become an attribute that somebody calls
    __slots__ = ('args', 'state')
    args: tuple
    state: Any

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args = args
        self.state = None
        return self

    # without it, pickle would let a file set attributes of the class itself
    def __setstate__(self, state):
        self.state = state


class InertDict(dict):
    """Stands for a kind of dict."""

    __slots__ = ()

    # see Inert; a dict has no state beside its items
    def __setstate__(self, state):
        pass


def stand_in(name: str) -> type[Inert]:
    """A kind of :class:`Inert` of its own."""
    return type(name, (Inert,), dict(__slots__=()))


class _Unpickler(pickle.Unpickler):
    """Builds the object graph out of stand-ins; no name of the file is ever looked up in a
    module."""

    def __init__(
        self, data: bytes, names: Mapping[str, Any], refuse: Callable[[str], Exception]
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._refuse = refuse

    def find_class(self, module, name):
        full_name = f'{module}.{name}'
        if full_name not in self._names:
            raise self._refuse(full_name[:200])
        return self._names[full_name]

    def persistent_load(self, pid):
        raise self._refuse('a reference to something outside the file')


def read_inert(data: bytes, names: Mapping[str, Any], refuse: Callable[[str], Exception]) -> Any:
    """Unpickle into stand-ins.

    Args:
        data (bytes): The pickle. Hostile bytes may raise anything.
        names: Full name of each class or function that may occur to what stands for it: an
            :func:`stand_in`, :class:`InertDict`, or a constant without attributes.
        refuse (callable): Makes an error of any other name.
    """
    for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        # writers count their memo up: a huge index would have the unpickler allocate that many
        # slots
        huge = opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and arg > count
        # extension codes may bypass find_class
        if huge or opcode.name in ('EXT1', 'EXT2', 'EXT4'):
            raise ValueError(f'opcode {opcode.name} {arg}')
    return _Unpickler(data, names, refuse).load()


def check_stored(archive: str | BinaryIO) -> None:
    """Refuse a file of torch's that is compressed: torch writes none, and a small one could unfold
    into any size.

    Raises:
        ValueError: If it is.
        zipfile.BadZipFile: If it is no zip archive.
    """
    with zipfile.ZipFile(archive) as file:
        for record in file.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f'{record.filename[:80]!r} in it is compressed')
    if not isinstance(archive, str):
        archive.seek(0)
