# Copyright (c) mmfgm authors.
"""Losses beside their equations: plain torch, registered in ``mmfgm/models/registration.py``."""

from .fgm import FGMLoss, fgm_terms
from .flow_matching import FlowMatchingLoss, flow_matching_loss
from .gan import discriminator_loss, generator_gan_loss

__all__ = [
    'FGMLoss',
    'FlowMatchingLoss',
    'discriminator_loss',
    'fgm_terms',
    'flow_matching_loss',
    'generator_gan_loss',
]
