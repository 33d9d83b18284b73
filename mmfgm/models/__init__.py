# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'base': ['FlowModel', 'Phase'],
        'discriminator': ['GAN', 'ConvDiscriminator'],
        'fgm': ['FGM'],
        'flow_matching': ['FlowMatching'],
        'generators': ['OneStepGenerator'],
        'families': ['SD3', 'CachedNullPrompt', 'LatentDecoder', 'SD3TextEncoder'],
        'losses': [
            'FGMLoss',
            'FlowMatchingLoss',
            'discriminator_loss',
            'fgm_terms',
            'flow_matching_loss',
            'generator_gan_loss',
        ],
        'networks': ['AdaLNMLP', 'EDMUNet', 'EDMVelocity', 'UNetVelocity'],
        'preprocessor': ['ImagePreprocessor', 'from_uint8'],
        'sampling': ['Sampler', 'Sampling'],
        'weights': ['latest_checkpoint', 'load_network', 'read_state_dict'],
    },
)
