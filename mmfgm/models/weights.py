# Copyright (c) mmfgm authors.
import io
import os
import os.path as osp
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmfgm.errors import NonFiniteInputError, UsageError
from mmfgm.files import check_regular
from mmfgm.processes import is_finite

# where a sharded checkpoint keeps the model
STATE_DICT = 'state_dict.'


def latest_checkpoint(work_dir: str) -> str | None:
    """The newest complete checkpoint of a work directory, which may have been moved; None if there
    is none."""
    pointer = osp.join(work_dir, 'last_checkpoint')
    if not osp.isfile(pointer):
        return None
    with open(pointer) as f:
        return osp.join(work_dir, osp.basename(f.read().strip()))


def read_state_dict(
    checkpoint: str, weights_only: bool = True, network: str = ''
) -> dict[str, Tensor]:
    """Read the model's tensors from a checkpoint, on the CPU.

    Args:
        checkpoint (str): A ``.safetensors`` file, a ``.pth`` file (with or without a ``state_dict``
            key), a directory that a sharded run saved, or a work directory, meaning its last
            checkpoint.
        weights_only (bool): Refuse pickles that hold anything but tensors and plain containers.
            ``False`` runs whatever code the file contains: only for files you trust.
        network (str): Only the tensors of this network, by their names in it; no others are read.
            Defaults to all.

    Raises:
        UsageError: If the file does not exist, cannot be read, needs ``weights_only=False``, or has
            no such network.
    """
    if not osp.exists(checkpoint):
        raise UsageError(
            f'checkpoint {checkpoint!r} does not exist (looked in {os.getcwd()}); train it first, '
            'or name an existing file'
        )
    checkpoint = latest_checkpoint(checkpoint) or checkpoint
    if osp.isdir(checkpoint):
        return _read_sharded(checkpoint, network)
    check_regular(checkpoint)
    if checkpoint.endswith('.safetensors'):
        try:
            state = load_file(checkpoint)
        except (SafetensorError, OSError) as e:
            raise UsageError(f'{checkpoint!r} cannot be read as a safetensors file: {e}') from e
    else:
        content = read_pickle(checkpoint, weights_only)
        state = content.get('state_dict', content)
    return {name: state[key] for name, key in _select(state, network, checkpoint).items()}


def _select(keys: Iterable[str], network: str, checkpoint: str) -> dict[str, str]:
    """Name inside the network to name in the checkpoint, of a network's tensors; of all, without a
    network."""
    if not network:
        return {key: key for key in keys}
    found = {key[len(network) + 1 :]: key for key in keys if key.startswith(f'{network}.')}
    if not found:
        raise UsageError(
            f'checkpoint {checkpoint!r} has no network {network!r}; it holds'
            f' {sorted({key.split(".")[0] for key in keys})}; set the prefix, or name the'
            ' checkpoint of this config'
        )
    return found


def read_pickle(filename: str, weights_only: bool = True) -> dict:
    """``torch.load`` to the CPU, with errors that say what to do; see :func:`read_state_dict`."""
    check_regular(filename)
    try:
        return torch.load(
            filename,
            map_location='cpu',
            weights_only=weights_only,
            mmap=zipfile.is_zipfile(filename),
        )
    except pickle.UnpicklingError as e:
        culprit = re.search(r'GLOBAL (\S+)', str(e))
        holds = f'({culprit.group(1)}) ' if culprit else ''
        raise UsageError(
            f'{filename!r} holds more than tensors and plain values {holds}and loading it could run'
            ' code. If you trust the file, say so with weights_only=False beside its path in the'
            ' config'
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        raise UsageError(
            f'{filename!r} cannot be read as a checkpoint: {str(e).strip() or type(e).__name__}'[
                :500
            ]
        ) from e


class _MetadataUnpickler(pickle.Unpickler):
    """Reads a sharded checkpoint's index and nothing else: torch would unpickle whatever it
    contains."""

    allowed = {
        'torch.distributed.checkpoint.metadata': (
            'Metadata',
            'TensorStorageMetadata',
            'BytesStorageMetadata',
            'TensorProperties',
            'ChunkStorageMetadata',
            'MetadataIndex',
            'StorageMeta',
            '_MEM_FORMAT_ENCODING',
        ),
        'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
        'torch.serialization': ('_get_layout',),
        'collections': ('OrderedDict',),
        'pathlib': ('PosixPath', 'WindowsPath'),
        'torch': (
            'Size',
            *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
        ),
    }

    def find_class(self, module, name):
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f'{module}.{name} has no place in a checkpoint')
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """``FileSystemReader`` that refuses code in the index."""

    def read_metadata(self, *args, **kwargs):
        try:
            with open(osp.join(self.path, '.metadata'), 'rb') as f:
                metadata = _MetadataUnpickler(f).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, OSError) as e:
            raise UsageError(f'{str(self.path)!r} is not a checkpoint that can be read: {e}') from e
        metadata.storage_meta = metadata.storage_meta or dcp.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(dcp.DefaultLoadPlanner):
    """``DefaultLoadPlanner`` that reads non-tensor values with ``weights_only``."""

    def load_bytes(self, read_item, value):
        plain = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _repack(plain))


def _repack(plain) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    return buffer


def sharded_shapes(directory: str) -> dict[str, torch.Size]:
    """Name to shape of every tensor in a sharded checkpoint; other values are left out."""
    metadata = SafeReader(directory).read_metadata().state_dict_metadata
    return {key: meta.size for key, meta in metadata.items() if hasattr(meta, 'size')}


def _read_sharded(directory: str, network: str) -> dict[str, Tensor]:
    if not osp.isfile(osp.join(directory, '.metadata')):
        raise UsageError(
            f'the folder {directory!r} holds no checkpoint: neither a last_checkpoint (a work dir'
            ' whose training has saved one) nor a .metadata (a sharded checkpoint); train it'
            ' first, or name another'
        )
    metadata = SafeReader(directory).read_metadata().state_dict_metadata
    keys = [key[len(STATE_DICT) :] for key in metadata if key.startswith(STATE_DICT)]
    names = {f'{STATE_DICT}{key}': name for name, key in _select(keys, network, directory).items()}
    tensors = {
        key: torch.empty(metadata[key].size, dtype=metadata[key].properties.dtype) for key in names
    }
    dcp.load(tensors, storage_reader=SafeReader(directory), planner=SafePlanner(), no_dist=True)
    return {names[key]: value for key, value in tensors.items()}


def fingerprint(network: nn.Module) -> str:
    """CRC-32 of a network's weights: tells whether a resumed run has the teacher it was started
    with.

    All processes must call it together on a network that is sharded over them.
    """
    crc = 0
    for value in network.state_dict().values():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        crc = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f'{crc:08x}'


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that would make every sample and every gradient nan; one pass over them.

    Args:
        tensors (Mapping[str, Tensor]): By name.
        source (str): Where they come from, for the message.

    Raises:
        NonFiniteInputError: Names the first of those that hold inf or nan.
    """
    bad = [
        name
        for name, value in tensors.items()
        if isinstance(value, Tensor) and not is_finite(value)
    ]
    if bad:
        raise NonFiniteInputError(
            f'{source!r} holds inf or nan in {len(bad)} of {len(tensors)} tensors, such as'
            f' {bad[0]!r}: it is damaged, or was saved by a run that had diverged; name another'
            ' file, or an earlier checkpoint of the run'
        )


def load_network(
    network: nn.Module,
    checkpoint: str,
    prefix: str = '',
    into: str = '',
    weights_only: bool = True,
    names: Collection[str] | None = None,
) -> nn.Module:
    """Load one network out of a checkpoint, strictly and in place.

    Args:
        network (nn.Module): Where the weights go.
        checkpoint (str): See :func:`read_state_dict`.
        prefix (str): The network's name inside the checkpoint, for example ``network_ema``; empty
            for a checkpoint of the bare network.
        into (str): The part of the network that the checkpoint is of, for example ``unet`` for a
            published EDM network inside :class:`EDMVelocity`; empty for all of it.
        weights_only (bool): See :func:`read_state_dict`.
        names (Collection[str], optional): The tensors of that part that the checkpoint holds.
            Defaults to all.

    Raises:
        UsageError: Names the first tensor that is missing, superfluous or of another shape.
    """
    state = read_state_dict(checkpoint, weights_only, prefix)
    try:
        part = network.get_submodule(into)
    except AttributeError as e:
        raise UsageError(
            f'{type(network).__name__} has no part {into!r}; its parts are '
            f'{[name for name, _ in network.named_children()]}'
        ) from e
    load_tensors(part, state, checkpoint, names)
    return network


def load_tensors(
    part: nn.Module, state: dict[str, Tensor], checkpoint: str, names: Collection[str] | None = None
) -> None:
    """Load tensors that were read from a checkpoint into a module, strictly and in place; see
    :func:`load_network`.

    Raises:
        UsageError: Names the checkpoint and the first tensor that is missing, superfluous or of
            another shape.
        NonFiniteInputError: If a tensor holds inf or nan.
    """
    expected = {
        key: value for key, value in part.state_dict().items() if names is None or key in names
    }
    wrong = f'checkpoint {checkpoint!r} is of another architecture than {type(part).__name__}: '
    for key, value in expected.items():
        if key not in state:
            raise UsageError(
                f'{wrong}tensor {key!r} of shape {tuple(value.shape)} is missing from it; make'
                ' the network settings agree'
            )
        if state[key].shape != value.shape:
            raise UsageError(
                f'{wrong}tensor {key!r} has shape {tuple(state[key].shape)} there, but the config'
                f' builds {tuple(value.shape)}; make the network settings agree'
            )
    for key in state:
        if key not in expected:
            raise UsageError(
                f'{wrong}its tensor {key!r} has no place in the network; make the'
                ' network settings agree'
            )
    check_finite(state, checkpoint)
    part.load_state_dict(state, strict=names is None)
