# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'edm_unet': ['EDMUNet'],
        'edm_velocity': ['EDMVelocity', 'UNetVelocity'],
        'mlp': ['AdaLNMLP'],
    },
)
