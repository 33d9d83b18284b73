# Copyright (c) mmfgm authors.
import os
import os.path as osp
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mmfgm.errors import DamagedError, NonFiniteInputError, UsageError
from mmfgm.files import asset_path, check_regular
from mmfgm.processes import is_finite

from .checksums import CHECKSUMS, check_content, checksum, compare
from .pickles import check_stored
from .sharded import EXTRAS, INDEX, SHARDS, check_shards, read_shards, sharded_shapes

# where a sharded checkpoint keeps the model
STATE_DICT = 'state_dict.'
# where a file keeps tensors beside other things: ours, and those that SiT's training saves
TENSOR_KEYS = ('state_dict', 'ema')


def latest_checkpoint(work_dir: str) -> str | None:
    """The newest complete checkpoint of a work directory, which may have been moved; None if there
    is none."""
    pointer = osp.join(work_dir, 'last_checkpoint')
    if not osp.isfile(pointer):
        return None
    with open(pointer, errors='replace') as f:
        name = osp.basename(f.read(10_000).strip())
    if not name or '\0' in name:
        raise DamagedError(pointer, f'{name[:80]!r} is no name of a checkpoint')
    return osp.join(work_dir, name)


def read_state_dict(
    checkpoint: str, weights_only: bool = True, network: str = ''
) -> dict[str, Tensor]:
    """Read the model's tensors from a checkpoint, on the CPU.

    Args:
        checkpoint (str): A ``.safetensors`` file, a ``.pth`` or ``.pt`` file (with or without a
            ``state_dict`` or, as SiT's training writes, an ``ema`` key), a directory that a sharded
            run saved, a work directory, meaning its last checkpoint, or ``mmfgm::assets/...``, see
            :func:`~mmfgm.files.asset_path`.
        weights_only (bool): Refuse pickles that hold anything but tensors and plain containers.
            ``False`` runs whatever code the file contains: only for files you trust.
        network (str): Only the tensors of this network, by their names in it; no others are read.
            Defaults to all.

    Raises:
        UsageError: If the file does not exist, cannot be read, needs ``weights_only=False``, or has
            no such network.
    """
    checkpoint = asset_path(checkpoint)
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
        state = read_safetensors(checkpoint)
    else:
        content = read_pickle(checkpoint, weights_only, _is_of(network))
        state = next((content[key] for key in TENSOR_KEYS if key in content), content)
        if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
        ):
            raise DamagedError(checkpoint, 'its state dict does not hold names and tensors')
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


def read_safetensors(filename: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, held against its checksum if it has one
    (:func:`safetensors_metadata`).

    Raises:
        DamagedError: If it cannot be read, or is not what was saved.
    """
    metadata = read_safetensors_metadata(filename)
    try:
        state = load_file(filename)
    except UsageError:
        raise
    # damaged bytes raise anything
    except Exception as e:
        raise DamagedError(filename, f'as a safetensors file: {e}') from e
    if CHECKSUMS in metadata:
        found = checksum([dict(sorted(state.items())), _without(metadata)])
        compare(filename, 'the content', metadata[CHECKSUMS], found)
    return state


def read_safetensors_metadata(filename: str) -> dict[str, str]:
    """What a safetensors file says beside its tensors.

    Raises:
        DamagedError: If it cannot be read.
    """
    try:
        check_regular(filename)
        with safe_open(filename, framework='pt') as file:
            return file.metadata() or {}
    except UsageError:
        raise
    # damaged bytes raise anything
    except Exception as e:
        raise DamagedError(filename, f'as a safetensors file: {e}') from e


def _without(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in sorted(metadata.items()) if key != CHECKSUMS}


def safetensors_metadata(tensors: dict[str, Tensor], **metadata: str) -> dict[str, str]:
    """The metadata that a safetensors file of ours is written with: what is given, and a checksum
    of that and the tensors."""
    metadata = {'format': 'pt', **metadata}
    found = checksum([dict(sorted(tensors.items())), _without(metadata)])
    return {**metadata, CHECKSUMS: found}


def read_pickle(
    filename: str, weights_only: bool = True, wanted: Callable[[str], bool] = lambda part: True
) -> dict:
    """``torch.load`` to the CPU, held against the checksums in the file.

    Args:
        filename (str): The file.
        weights_only (bool): See :func:`read_state_dict`.
        wanted (callable): The parts that will be used, which are the ones to check (see
            :func:`~mmfgm.models.checksums.check_content`). Defaults to all.

    Raises:
        DamagedError: If it cannot be read, or a part is not what was saved.
        UsageError: If it needs ``weights_only=False``.
    """
    try:
        check_regular(filename)
        zipped = zipfile.is_zipfile(filename)
        if zipped:
            check_stored(filename)
        content = torch.load(filename, map_location='cpu', weights_only=weights_only, mmap=zipped)
    except UsageError:
        raise
    except pickle.UnpicklingError as e:
        culprit = re.search(r'GLOBAL (\S+)', str(e))
        if culprit is None:
            raise DamagedError(filename, str(e)) from e
        raise UsageError(
            f'{filename!r} holds more than tensors and plain values ({culprit.group(1)}) and'
            ' loading it could run code. If you trust the file, say so with weights_only=False'
            ' beside its path in the config'
        ) from e
    # damaged bytes raise anything, MemoryError and RecursionError included
    except Exception as e:
        raise DamagedError(filename, str(e).strip() or type(e).__name__) from e
    if not isinstance(content, dict):
        raise DamagedError(filename, f'it is a {type(content).__name__} rather than a dict')
    check_content(content, filename, wanted)
    return content


def _read_sharded(directory: str, network: str) -> dict[str, Tensor]:
    if not osp.lexists(osp.join(directory, INDEX)):
        raise UsageError(
            f'the folder {directory!r} holds no checkpoint: neither a last_checkpoint (a work dir'
            ' whose training has saved one) nor a .metadata (a sharded checkpoint); train it'
            ' first, or name another'
        )
    wanted = _is_of(network)
    extras = osp.join(directory, EXTRAS)
    # torch writes directories without them
    if osp.lexists(extras):
        check_shards(directory, read_pickle(extras), wanted=wanted)
    shapes = sharded_shapes(directory)
    keys = [key[len(STATE_DICT) :] for key in shapes if key.startswith(STATE_DICT)]
    selected = _select(keys, network, directory)
    return read_shards(directory, {f'{STATE_DICT}{key}': name for name, key in selected.items()})


def _is_of(network: str) -> Callable[[str], bool]:
    """Which parts of a checkpoint hold a network's tensors; without a network, all networks'."""
    prefix = f'{STATE_DICT}{network}'
    return lambda part: part == prefix if network else part.startswith(prefix)


def verify_checkpoint(checkpoint: str) -> None:
    """Read a checkpoint, with everything that a run needs to go on, and check it.

    Raises:
        DamagedError: If it is damaged.
    """
    if osp.isdir(checkpoint):
        extras = read_pickle(osp.join(checkpoint, EXTRAS))
        if SHARDS in extras:
            check_shards(checkpoint, extras)
        else:
            read_shards(checkpoint, {name: name for name in sharded_shapes(checkpoint)})
    else:
        read_pickle(checkpoint)


def newest_whole(work_dir: str) -> str | None:
    """The newest checkpoint of a work dir that is not damaged, among all ``iter_*``, which are
    read."""
    found = {
        int(match.group(1)): name
        for name in (os.listdir(work_dir) if osp.isdir(work_dir) else ())
        if (match := re.fullmatch(r'iter_(\d+)\.pth', name))
    }
    for _, name in sorted(found.items(), reverse=True):
        try:
            verify_checkpoint(osp.join(work_dir, name))
        except UsageError:
            continue
        return osp.join(work_dir, name)
    return None


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
