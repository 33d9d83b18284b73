# Copyright (c) mmfgm authors.
"""Reads the network pickles that NVIDIA published with EDM (Karras et al., 2022) without running
anything in them."""

import hashlib
import io
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mmfgm.errors import DamagedError, UsageError
from mmfgm.files import check_regular

from .networks import ADMUNet, EDMUNet
from .pickles import Inert, InertDict, read_inert, stand_in
from .weights import check_finite

ADVICE = (
    "expected one of EDM's published networks, such as edm-cifar10-32x32-cond-vp.pkl; download it"
    ' again'
)
# class names in the files to ours
UNETS: dict[str, type[ADMUNet] | type[EDMUNet]] = {'SongUNet': EDMUNet, 'DhariwalUNet': ADMUNet}
NAMES: dict[type, str] = {EDMUNet: 'DDPM++', ADMUNet: 'ADM'}
# how torch pickles a storage: first its magic number 0x1950a86a20f9469cfc6c; not a zip or tar
# archive
STORAGE_START = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


_Persistent, _Container, _Tensor, _Parameter, _Storage = map(
    stand_in, ('object', 'container', 'tensor', 'parameter', 'storage')
)

GLOBALS = {
    'torch_utils.persistence._reconstruct_persistent_obj': _Persistent,
    'torch.nn.modules.container.ModuleDict': _Container,
    'torch.nn.modules.container.ModuleList': _Container,
    'torch._utils._rebuild_tensor_v2': _Tensor,
    'torch._utils._rebuild_parameter': _Parameter,
    'torch.storage._load_from_bytes': _Storage,
    'dnnlib.util.EasyDict': InertDict,
    'collections.OrderedDict': InertDict,
}


def _refuse(name: str) -> UsageError:
    return UsageError(
        f'holds {name}, which is not of a network and could run code (it was not); {ADVICE}'
    )


def _once(item: Any, name: str, seen: set[int]) -> Any:
    """Stops cycles, and small files that unfold into large ones."""
    if id(item) in seen:
        raise UsageError(
            f'holds {name[:200]!r} within itself or twice, which no network of EDM does; {ADVICE}'
        )
    seen.add(id(item))
    return item


def _storage(stand_in: Inert) -> torch.storage.TypedStorage:
    (data,) = stand_in.args
    if not data.startswith(STORAGE_START):
        raise UsageError(
            f'has a storage in a format that torch does not use inside pickles; {ADVICE}'
        )
    try:
        storage = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        culprit = re.search(r'GLOBAL (\S+)|$', str(e)).group(1) or 'damaged'
        raise UsageError(
            f'has a storage with more than numbers ({culprit[:200]}); none of it was run; {ADVICE}'
        ) from e
    if not isinstance(storage, torch.storage.TypedStorage) or not storage.dtype.is_floating_point:
        raise UsageError(
            f'has a storage of {getattr(storage, "dtype", type(storage))}, not of floating-point;'
            f' {ADVICE}'
        )
    return storage


def _tensor(stand_in: Inert, name: str, seen: set[int]) -> Tensor:
    """Rebuild a tensor as float32, within the bounds of its storage."""
    if isinstance(stand_in, _Parameter):
        stand_in = stand_in.args[0]
    if not isinstance(stand_in, _Tensor):
        raise UsageError(
            f'has a {type(stand_in).__name__} where the tensor {name[:200]!r} was expected;'
            f' {ADVICE}'
        )
    source, offset, size, stride = stand_in.args[:4]
    storage = _storage(_once(source, name, seen))
    untyped = storage._untyped_storage  # the public untyped() warns
    length = untyped.nbytes() // storage.dtype.itemsize
    numbers = (offset, *size, *stride)
    inside = (
        all(type(n) is int and n >= 0 for n in numbers)
        and len(size) == len(stride)
        and math.prod(size) <= length
    )
    if not inside or (
        math.prod(size) and offset + sum((n - 1) * s for n, s in zip(size, stride)) >= length
    ):
        raise UsageError(
            f'has a tensor {name[:200]!r} that does not fit in its storage of {length} numbers;'
            f' {ADVICE}'
        )
    return torch.empty(0, dtype=storage.dtype).set_(untyped, offset, size, stride).float()


def _state(module: Inert) -> dict[str, Any]:
    return module.args[0]['state'] if isinstance(module, _Persistent) else module.state


def _collect(
    module: Inert, prefix: str, tensors: dict[str, Tensor], states: list[dict], seen: set[int]
) -> None:
    """Add the tensors below a module to ``tensors`` and the modules' attributes to ``states``,
    outermost first."""
    state = _state(_once(module, prefix, seen))
    states.append(state)
    for name, value in (*state['_parameters'].items(), *state['_buffers'].items()):
        if value is not None:
            tensors[prefix + name] = _tensor(value, prefix + name, seen)
    for name, child in state['_modules'].items():
        if child is not None:
            _collect(child, f'{prefix}{name}.', tensors, states, seen)


def _check_class(module: Any, expected: Collection[str], what: str, fix: str) -> str:
    """The name of a module's class, which must be one of those expected."""
    if not isinstance(module, _Persistent):
        raise UsageError(
            f'has a {type(module).__name__} as its {what}, where a network was expected; {ADVICE}'
        )
    name = module.args[0]['class_name']
    if name not in expected:
        raise UsageError(
            f'has the {what} {str(name)[:80]}, but only {" and ".join(expected)} can be converted;'
            f' {fix}'
        )
    return name


def _refuse_other_architectures(tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        resampling = name.endswith('.resample_filter')
        if re.search(r'^map_noise\.|_aux_(down|up|skip|residual)\b', name) or (
            resampling and max(value.shape) > 2
        ):
            raise UsageError(
                f'is an NCSN++ network (it has the tensor {name!r} {tuple(value.shape)}), but only'
                " DDPM++ and ADM can be converted; use the file with 'vp' instead of 've' in its"
                ' name'
            )
        if resampling and not value.eq(0.25).all():
            raise UsageError(
                f'resamples with the filter {name!r} other than the 2x2 mean, which EDMUNet has'
                f' not; {ADVICE}'
            )


def _recorded(states: list[dict], name: str, default: float) -> float:
    """A constructor's value, as the outermost module that knows it has it."""
    for state in states:
        for values in (state, state.get('_init_kwargs')):
            if isinstance(values, dict) and type(values.get(name)) in (int, float):
                return float(values[name])
    return default


def _infer_unet(tensors: dict[str, Tensor], unet: type) -> dict[str, Any]:
    """The arguments of a U-Net, but for the dropout, from the names and shapes of its tensors."""
    blocks = Counter(
        re.findall(r'^enc\.(\d+)x\1_block\d+\.conv0\.weight$', '\n'.join(tensors), re.MULTILINE)
    )
    levels = sorted(blocks, key=int, reverse=True)
    if not levels:
        raise UsageError(
            f'has no encoder blocks (enc.32x32_block0 and so on) in its network; {ADVICE}'
        )
    full = f'{levels[0]}x{levels[0]}'
    model_channels, in_channels = tensors[f'enc.{full}_conv.weight'].shape[:2]
    out_conv = f'dec.{full}_aux_conv.weight'
    if unet is ADMUNet:  # its first convolution has the first level's channels
        model_channels = tensors['map_layer0.weight'].shape[1]
        out_conv = 'out_conv.weight'

    def inputs(layer: str) -> int:
        return tensors[f'{layer}.weight'].shape[1] if f'{layer}.weight' in tensors else 0

    return dict(
        img_resolution=int(levels[0]),
        in_channels=in_channels,
        out_channels=tensors[out_conv].shape[0],
        label_dim=inputs('map_label'),
        augment_dim=inputs('map_augment'),
        model_channels=model_channels,
        channel_mult=[
            tensors[f'enc.{r}x{r}_block0.conv0.weight'].shape[0] // model_channels for r in levels
        ],
        num_blocks=blocks[levels[0]],
        # not from the decoder: its lowest in0 has attention at any resolution
        attn_resolutions=[int(r) for r in levels if f'enc.{r}x{r}_block0.qkv.weight' in tensors],
    )


def _check_shapes(tensors: dict[str, Tensor], unet: type, arguments: dict[str, Any]) -> None:
    with torch.device('meta'):
        state = unet(**arguments).state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in (*expected, *found):
        if expected.get(name) != found.get(name):
            raise UsageError(
                f'is no {NAMES[unet]} network: {name[:200]!r} has the shape {found.get(name)}'
                f' there, but {expected.get(name)} in {unet.__name__} with {arguments}; {ADVICE}'
            )


def _convert(content: Any, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(content, dict) or key not in content:
        found = (
            [str(name)[:40] for name in content][:20]
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise UsageError(f'has no {key!r}; it holds {found}; choose the key of the network')
    network = content[key]
    tensors = {}
    states = []
    _check_class(
        network,
        ['EDMPrecond'],
        f'preconditioning (at {key!r})',
        'use a file edm-*.pkl of EDM: they all have it',
    )
    name = _check_class(
        _state(network)['_modules']['model'],
        UNETS,
        'model class',
        "use a 'vp' file (DDPM++) or an 'adm' file",
    )
    _collect(network, '', tensors, states, set())
    tensors = {re.sub(r'^model\.', '', name): value for name, value in tensors.items()}
    _refuse_other_architectures(tensors)

    sigma_data = _recorded(states, 'sigma_data', 0.5)
    dropout = _recorded(states, 'dropout', 0.0)
    if not 0 < sigma_data < math.inf or not 0 <= dropout < 1:
        raise UsageError(
            f'records sigma_data={sigma_data} and dropout={dropout}, which no network has; {ADVICE}'
        )
    unet = UNETS[name]
    arguments = dict(_infer_unet(tensors, unet), dropout=dropout)
    _check_shapes(tensors, unet, arguments)
    check_finite(tensors, key)
    return tensors, dict(unet=dict(type=unet.__name__, **arguments), sigma_data=sigma_data)


def read_edm_pickle(
    filename: str, key: str = 'ema', sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a DDPM++ or ADM network from one of EDM's pickles, on the CPU and in float32; nothing in
    the file is run.

    Args:
        filename (str): For example ``edm-cifar10-32x32-cond-vp.pkl`` or
            ``edm-imagenet-64x64-cond-adm.pkl``.
        key (str): Which network of the file. Defaults to ``'ema'``, the only one in published
            files.
        sha256 (str, optional): What the file must have. The format has no checksum of its own, so
            damage to its numbers is noticed only with it.

    Returns:
        tuple: The state dict of :class:`EDMUNet` or :class:`ADMUNet`, and the arguments of
            :class:`EDMVelocity` around it, ``dict(unet=dict(type=...), sigma_data=...)``, inferred
            from the tensors and what the file records.

    Raises:
        UsageError: If the file does not exist, is damaged, holds anything that could run code, or
            holds another network: an NCSN++ (``ve``), another model class or another
                preconditioning.
        NonFiniteInputError: If its weights hold inf or nan.
    """
    check_regular(filename)
    try:
        with open(filename, 'rb') as f:
            data = f.read()
    except OSError as e:
        raise UsageError(
            f'the network pickle {filename!r} cannot be read: {e.strerror} (looked in'
            f' {os.getcwd()}); name an existing file'
        ) from e
    found = hashlib.sha256(data).hexdigest()
    if sha256 not in (None, found):
        raise DamagedError(filename, f'it has the SHA-256 {found}, not {sha256}')
    try:
        return _convert(read_inert(data, GLOBALS, _refuse), key)
    except UsageError as e:
        raise type(e)(f'{filename!r} {e}') from e
    # damaged and hostile bytes raise anything, MemoryError and RecursionError included
    except Exception as e:
        raise UsageError(
            f'{filename!r} is damaged ({type(e).__name__}: {str(e)[:200]}); {ADVICE}'
        ) from e
