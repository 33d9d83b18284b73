# Copyright (c) mmfgm authors.
from .fgm import FGMLoss, fgm_terms
from .flow_matching import flow_matching_loss
from .gan import discriminator_loss, generator_gan_loss

__all__ = ['FGMLoss', 'discriminator_loss', 'fgm_terms', 'flow_matching_loss', 'generator_gan_loss']
