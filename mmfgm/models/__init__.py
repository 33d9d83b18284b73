# Copyright (c) mmfgm authors.
from mmfgm.flow import ClassifierFreeGuidance, LogitNormal, NullLabel, Uniform, euler, heun
from mmfgm.registry import FUNCTIONS, TASK_UTILS

from .base import FlowModel, Phase, Sampling
from .discriminator import GAN, ConvDiscriminator
from .families import SD3, CachedNullPrompt, LatentDecoder, SD3TextEncoder
from .fgm import FGM
from .flow_matching import FlowMatching
from .generator import OneStepGenerator
from .losses import FGMLoss, discriminator_loss, fgm_terms, flow_matching_loss, generator_gan_loss
from .networks import AdaLNMLP, EDMUNet, EDMVelocity, UNetVelocity
from .preprocessor import ImagePreprocessor, from_uint8
from .weights import latest_checkpoint, load_network, read_state_dict

# mmfgm.flow is pure torch; its parts get their config names here
for part in (LogitNormal, Uniform, NullLabel):
    TASK_UTILS.register_module(module=part)
for solver in (euler, heun):
    FUNCTIONS.register_module(module=solver)


@TASK_UTILS.register_module(name='ClassifierFreeGuidance')
def build_guidance(scale: float, null: dict) -> ClassifierFreeGuidance:
    """Build guidance from a config in which ``null`` is a config too."""
    return ClassifierFreeGuidance(scale, TASK_UTILS.build(null))


__all__ = [
    'FGM',
    'GAN',
    'SD3',
    'AdaLNMLP',
    'CachedNullPrompt',
    'ConvDiscriminator',
    'EDMUNet',
    'EDMVelocity',
    'FGMLoss',
    'FlowMatching',
    'FlowModel',
    'ImagePreprocessor',
    'LatentDecoder',
    'OneStepGenerator',
    'Phase',
    'SD3TextEncoder',
    'Sampling',
    'UNetVelocity',
    'discriminator_loss',
    'fgm_terms',
    'flow_matching_loss',
    'from_uint8',
    'generator_gan_loss',
    'latest_checkpoint',
    'load_network',
    'read_state_dict',
]
