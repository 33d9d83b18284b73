# Copyright (c) mmfgm authors.
from .edm_unet import EDMUNet
from .edm_velocity import EDMVelocity, UNetVelocity
from .mlp import AdaLNMLP
from .sd3 import SD3

__all__ = ['SD3', 'AdaLNMLP', 'EDMUNet', 'EDMVelocity', 'UNetVelocity']
