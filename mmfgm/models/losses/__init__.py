# Copyright (c) mmfgm authors.
"""Losses beside their equations: plain torch, registered in ``mmfgm/models/registration.py``.

All are means over the elements of a sample. One of the generator is called ``loss(u, v, path)``,
and so is one of the online network, whose ``u`` is None.
"""

from .base import GeneratorLoss
from .consistency import VelocityConsistencyLoss
from .fgm import FGMLoss, fgm_terms
from .flow_matching import FlowMatchingLoss
from .gan import discriminator_loss, generator_gan_loss
from .gradients import DiffInstructLoss, DMDLoss
from .realuid import RealUIDLoss, RealUIDOnlineLoss

__all__ = [
    'DMDLoss',
    'DiffInstructLoss',
    'FGMLoss',
    'FlowMatchingLoss',
    'GeneratorLoss',
    'RealUIDLoss',
    'RealUIDOnlineLoss',
    'VelocityConsistencyLoss',
    'discriminator_loss',
    'fgm_terms',
    'generator_gan_loss',
]
