# Copyright (c) mmfgm authors.
"""Whether an export describes the network that its weights are of, before that takes memory."""

import math
import os.path as osp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmfgm.config import leaves
from mmfgm.errors import DamagedError, UsageError
from mmfgm.models import build_generator
from mmfgm.registry import MODELS

from .artifacts import EXPORT_FILE, WEIGHTS_FILE

# arguments that count layers: each has a tensor of its own at least
COUNTS = ('depth', 'num_layers', 'num_single_layers', 'num_blocks', 'layers_per_block')
# numbers in one sample: 4,096 x 4,096 pixels of three colours are three quarters of it
LARGEST_EVENT = 2**26


def check_sizes(path: str, model: dict[str, Any]) -> None:
    """Compare a description with the sizes in the header of the weights beside it.

    Args:
        path (str): An export of one generator.
        model (dict): Configs of its ``network`` and ``generator``, which :mod:`mmfgm.apis.schema`
            has let pass.

    Raises:
        DamagedError: If the weights have no header.
        UsageError: If the network would have other sizes, or samples too large for any memory.
    """
    file = osp.join(path, WEIGHTS_FILE)
    try:
        with safe_open(file, 'pt') as f:
            names = list(f.keys())
            stored = sum(math.prod(f.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as e:
        raise DamagedError(file, str(e)) from e
    description = osp.join(path, EXPORT_FILE)
    for place, value in leaves(model['network'], 'model.network'):
        if place.rpartition('.')[2] in COUNTS and isinstance(value, int) and value > len(names):
            _refuse(description, f'{place} to be at most {len(names)}, the tensors there', value)
    try:
        with torch.device('meta'):  # shapes without numbers
            network = MODELS.build(dict(model['network']))
            built = build_generator(model.get('generator'), network)
    except NotImplementedError:  # a class of the program's own that looks at its numbers
        return
    except (RuntimeError, OverflowError, ValueError, TypeError) as e:
        _refuse(description, 'a network that can be built', e)
    size = sum(value.numel() for value in built.state_dict().values())
    if size != stored:
        _refuse(description, f'a network of {stored} numbers, as {WEIGHTS_FILE} holds', size)
    if math.prod(network.event_shape) > LARGEST_EVENT:
        _refuse(description, f'samples of at most {LARGEST_EVENT} numbers', network.event_shape)


def _refuse(file: str, expected: str, found: Any) -> None:
    raise UsageError(f'expected {expected}, found {str(found)[:120]!r} in {file!r}; export again')
