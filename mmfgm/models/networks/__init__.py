# Copyright (c) mmfgm authors.
from .edm_unet import EDMUNet
from .edm_velocity import EDMVelocity, UNetVelocity
from .mlp import AdaLNMLP

__all__ = ['AdaLNMLP', 'EDMUNet', 'EDMVelocity', 'UNetVelocity']
