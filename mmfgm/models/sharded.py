# Copyright (c) mmfgm authors.
"""Reads directories that torch's distributed checkpoint (DCP) wrote, whoever they come from.

Such a directory holds an index, ``.metadata``, and files of tensors, ``__RANK_NUMBER.distcp``. Ours
also hold ``extras.pth``, with everything that is not sharded and with the checksums of the rest.
"""

import io
import math
import os.path as osp
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmfgm.errors import DamagedError, UsageError
from mmfgm.files import check_regular

from .checksums import compare, part_of, range_checksum, warn_unchecked
from .pickles import Inert, InertDict, check_stored, read_inert, stand_in

INDEX = '.metadata'
EXTRAS = 'extras.pth'
# entry of the extras
SHARDS = 'shards'

_Metadata, _Tensor, _Bytes, _Properties, _Chunk, _Index, _Location, _Size, _Ignored = map(
    stand_in,
    (
        'metadata',
        'tensor',
        'bytes',
        'properties',
        'chunk',
        'index',
        'location',
        'size',
        'other value',
    ),
)
_DCP = 'torch.distributed.checkpoint'
NAMES = {
    f'{_DCP}.metadata.Metadata': _Metadata,
    f'{_DCP}.metadata.TensorStorageMetadata': _Tensor,
    f'{_DCP}.metadata.BytesStorageMetadata': _Bytes,
    f'{_DCP}.metadata.TensorProperties': _Properties,
    f'{_DCP}.metadata.ChunkStorageMetadata': _Chunk,
    f'{_DCP}.metadata.MetadataIndex': _Index,
    f'{_DCP}.filesystem._StorageInfo': _Location,
    'torch.Size': _Size,
    'collections.OrderedDict': InertDict,
    # what of the index we do not need
    f'{_DCP}.metadata.StorageMeta': _Ignored,
    f'{_DCP}.metadata._MEM_FORMAT_ENCODING': _Ignored,
    'torch.serialization._get_layout': _Ignored,
    'pathlib.PosixPath': _Ignored,
    'pathlib.WindowsPath': _Ignored,
    'pathlib._local.PosixPath': _Ignored,
    'pathlib._local.WindowsPath': _Ignored,
    # a dtype has no attributes that could be set
    **{
        f'torch.{name}': value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}


def read_index(directory: str) -> tuple[Metadata, bytes]:
    """The index of a sharded checkpoint, and its bytes; nothing in it is run.

    Raises:
        DamagedError: If it is not an index, or says what its files do not hold.
        UsageError: If it names a class or a function that has no place in it.
    """
    path = osp.join(directory, INDEX)
    try:
        check_regular(path)
        with open(path, 'rb') as f:
            data = f.read()
        return _interpret(read_inert(data, NAMES, _refusal(directory)), directory), data
    except UsageError:
        raise
    # damaged and hostile bytes raise anything, MemoryError and RecursionError included
    except Exception as e:
        raise DamagedError(directory, f'its {INDEX}: {e!r}') from e


def _refusal(directory: str) -> Callable[[str], UsageError]:
    return lambda name: UsageError(
        f'{directory!r} is not a checkpoint that can be read: {name} has no place in a checkpoint'
        ' and could run code (it was not); name another checkpoint'
    )


def _expect(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _numbers(size: Any) -> torch.Size:
    """``torch.Size((2, 3))``"""
    _expect(type(size) is _Size, 'a size of another kind')
    (numbers,) = size.args or ((),)
    _expect(
        isinstance(numbers, (tuple, list)) and all(type(n) is int and n >= 0 for n in numbers),
        'a size that is not of whole numbers',
    )
    return torch.Size(numbers)


def _fields(value: Any, kind: type[Inert]) -> dict[str, Any]:
    _expect(type(value) is kind and isinstance(value.state, dict), f'no {kind.__name__}')
    return value.state


def _interpret(stand_in: Any, directory: str) -> Metadata:
    """Make the index out of stand-ins, as far as it is needed to load.

    A tensor must not be larger than its bytes in the files, so that no index makes a reader
    allocate more than those.
    """
    top = _fields(stand_in, _Metadata)
    sizes: dict[str, int] = {}
    locations: dict[MetadataIndex, _StorageInfo] = {}
    stored: dict[str, int] = defaultdict(int)
    for key, value in top['storage_data'].items():
        index = _fields(key, _Index)
        location = _fields(value, _Location)
        offset = index.get('offset')
        file, start, length = (location[name] for name in ('relative_path', 'offset', 'length'))
        _expect(isinstance(index['fqn'], str), 'a name that is not text')
        _expect(
            isinstance(file, str) and re.fullmatch(r'__\d+_\d+\.distcp', file),
            f'a file of another name: {str(file)[:80]!r}',
        )
        _expect(
            type(start) is int and type(length) is int and start >= 0 <= length,
            'an offset that is not a whole number',
        )
        _expect(location.get('transform_descriptors') is None, 'a compressed tensor')
        if file not in sizes:
            check_regular(osp.join(directory, file))
            sizes[file] = osp.getsize(osp.join(directory, file))
        _expect(start + length <= sizes[file], f'{file} has only {sizes[file]} bytes')
        stored[index['fqn']] += length
        locations[MetadataIndex(index['fqn'], None if offset is None else _numbers(offset))] = (
            _StorageInfo(file, start, length)
        )

    entries: dict[str, Any] = {}
    for name, value in top['state_dict_metadata'].items():
        _expect(isinstance(name, str), 'a name that is not text')
        if type(value) is _Bytes:
            entries[name] = BytesStorageMetadata()
            continue
        fields = _fields(value, _Tensor)
        size = _numbers(fields['size'])
        _expect(type(fields['properties']) is _Properties, 'no properties')
        dtype, _, requires_grad, *_ = fields['properties'].state
        _expect(isinstance(dtype, torch.dtype), 'a dtype of another kind')
        _expect(
            math.prod(size) * dtype.itemsize <= stored[name],
            f'{name[:200]!r} of {tuple(size)} has only {stored[name]} bytes',
        )
        chunks = [_fields(chunk, _Chunk) for chunk in fields['chunks']]
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype, requires_grad=bool(requires_grad)),
            size,
            [
                ChunkStorageMetadata(_numbers(chunk['offsets']), _numbers(chunk['sizes']))
                for chunk in chunks
            ],
        )
    planner = top.get('planner_data') or {}
    _expect(
        isinstance(planner, dict)
        and all(
            isinstance(path, tuple) and all(type(key) in (str, int) for key in path)
            for path in planner.values()
        ),
        'names of another kind',
    )
    version = top.get('version')
    return Metadata(
        entries,
        dict(planner),
        locations,
        StorageMeta(),
        version if isinstance(version, str) else None,
    )


class SafeReader(dcp.FileSystemReader):
    """``FileSystemReader`` of an index in which nothing is run, and of tensors that are stored
    plainly: compressed ones could be any size."""

    def read_metadata(self, *args, **kwargs):
        metadata, _ = read_index(str(self.path))
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _slice_file(self, file, sinfo):
        data = io.BytesIO(super()._slice_file(file, sinfo).read())
        check_stored(data)
        return data


class SafePlanner(dcp.DefaultLoadPlanner):
    """``DefaultLoadPlanner`` that reads non-tensor values with ``weights_only``."""

    def load_bytes(self, read_item, value):
        check_stored(value)
        plain = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _repack(plain))


def _repack(plain) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    return buffer


def shard_checksums(
    directory: str, rank: int, processes: int, wanted: Callable[[str], bool] = lambda part: True
) -> dict[str, dict[str, str]]:
    """Checksums of the tensors in the files of a sharded checkpoint, as they lie there.

    Args:
        directory (str): The checkpoint.
        rank (int), processes (int): Which files to read: every process takes others.
        wanted (callable): Which parts (see :func:`~mmfgm.models.checksums.part_of`). Defaults to
            all.

    Returns:
        dict: File to part to checksum.

    Raises:
        DamagedError: If the index or a file cannot be read.
    """
    metadata, _ = read_index(directory)
    ranges: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for index, location in metadata.storage_data.items():
        part = part_of(index.fqn)
        if wanted(part):
            ranges[location.relative_path][part].append((location.offset, location.length))
    try:
        return {
            file: {
                part: range_checksum(osp.join(directory, file), places)
                for part, places in sorted(ranges[file].items())
            }
            for file in sorted(ranges)[rank::processes]
        }
    except OSError as e:
        raise DamagedError(directory, str(e)) from e


def index_checksum(directory: str) -> str:
    """Of a sharded checkpoint's index."""
    path = osp.join(directory, INDEX)
    check_regular(path)
    try:
        return range_checksum(path, [(0, osp.getsize(path))])
    except OSError as e:
        raise DamagedError(directory, str(e)) from e


def check_shards(
    directory: str,
    extras: dict,
    rank: int = 0,
    processes: int = 1,
    wanted: Callable[[str], bool] = lambda part: True,
) -> None:
    """Hold index and files of a sharded checkpoint against the checksums in its extras.

    Args:
        directory (str): See :func:`shard_checksums`, as for all that is not named here.
        extras (dict): Content of :data:`EXTRAS`.

    Raises:
        DamagedError: Names the first file and part that are not what was saved.
    """
    recorded = extras.get(SHARDS)
    if recorded is None:
        if 'mmfgm' in extras.get('meta', {}):
            warn_unchecked(directory)
        return
    compare(osp.join(directory, INDEX), 'the index', recorded[INDEX], index_checksum(directory))
    for file, parts in shard_checksums(directory, rank, processes, wanted).items():
        for part, found in parts.items():
            compare(osp.join(directory, file), part, recorded.get(file, {}).get(part), found)


def sharded_shapes(directory: str) -> dict[str, torch.Size]:
    """Name to shape of every tensor in a sharded checkpoint; other values are left out."""
    metadata, _ = read_index(directory)
    return {
        name: meta.size
        for name, meta in metadata.state_dict_metadata.items()
        if isinstance(meta, TensorStorageMetadata)
    }


def load_shards(state: dict[str, Any], directory: str, no_dist: bool = False) -> None:
    """Fill a state dict from a sharded checkpoint, in place; every process reads its own part.

    Raises:
        DamagedError: On all processes, if one of them cannot read its part.
    """
    try:
        dcp.load(
            state,
            storage_reader=SafeReader(directory),
            planner=SafePlanner(),
            no_dist=no_dist,
        )
    # torch's own is no Exception
    except (CheckpointException, Exception) as e:
        causes = [error for error, _ in getattr(e, 'failures', {}).values()] or [e]
        for cause in causes:
            if isinstance(cause, UsageError):
                raise cause from e
        raise DamagedError(directory, repr(causes[0])) from e


def read_shards(directory: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Read tensors of a sharded checkpoint whole, on the CPU.

    Args:
        directory (str): The checkpoint.
        names (dict): Name in the checkpoint to name in the result.
    """
    metadata = read_index(directory)[0].state_dict_metadata
    tensors = {
        name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype)
        for name in names
    }
    load_shards(tensors, directory, no_dist=True)
    return {names[name]: value for name, value in tensors.items()}
