# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'adm_unet': ['ADMUNet'],
        'edm_unet': ['EDMUNet'],
        'edm_velocity': ['EDMVelocity', 'UNetVelocity'],
        'mlp': ['AdaLNMLP'],
        'sit': ['SiT'],
    },
)
