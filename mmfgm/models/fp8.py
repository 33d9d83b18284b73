# Copyright (c) mmfgm authors.
"""Matrix products of a frozen network in 8 bits."""

import dataclasses
import warnings

import torch
from torch import nn

from mmfgm.errors import UsageError

# cuBLAS multiplies 8-bit matrices of such sides only
MULTIPLE = 16
ON = (8, 9)  # compute capability of Ada and Hopper, the first that do


def to_fp8(network: nn.Module) -> nn.Module:
    """Let the linear layers of a network multiply in float8 (e4m3), by torchao: both sides of each
    product are rounded, forward and backward, with a scale for each row that is a power of two.

    Weights stay as they are, and with them state dicts, sharding and what is exported. GPUs before
    Ada, and CPUs, compute the same with slower arithmetic.

    Args:
        network (nn.Module): Frozen. It is changed; layers whose sides are no multiples of 16 stay.

    Raises:
        UsageError: If torchao is missing, or no layer can be changed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as e:
        raise UsageError(
            'expected torchao for model.teacher.fp8, found that it cannot be imported; pip install'
            ' torchao, or set fp8=False'
        ) from e
    native = torch.cuda.is_available() and torch.cuda.get_device_capability() >= ON
    if not native:
        warnings.warn('model.teacher.fp8: this device has no fp8; it is emulated', stacklevel=2)
    changed = []

    def fits(layer: nn.Module, name: str) -> bool:
        right = all(side % MULTIPLE == 0 for side in layer.weight.shape)
        changed.extend([name] if right else [])
        return right

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name('rowwise'), emulate=not native)
    network = convert_to_float8_training(network, module_filter_fn=fits, config=config)
    if not changed:
        raise UsageError(
            f'expected linear layers with sides of multiples of {MULTIPLE} for model.teacher.fp8,'
            f' found none in {type(network).__name__}; set fp8=False'
        )
    return network
