# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'base': ['FlowModel', 'Phase'],
        'discriminator': ['GAN', 'ConvDiscriminator'],
        'edm_checkpoint': ['read_edm_pickle'],
        'families': ['SD3', 'CachedNullPrompt', 'LatentDecoder', 'SD3TextEncoder'],
        'fgm': ['FGM'],
        'flow_matching': ['FlowMatching'],
        'generators': ['OneStepGenerator'],
        'lora': ['has_adapters', 'merge_adapters', 'move_to'],
        'losses': [
            'DMDLoss',
            'DiffInstructLoss',
            'FGMLoss',
            'FlowMatchingLoss',
            'GeneratorLoss',
            'RealUIDLoss',
            'RealUIDOnlineLoss',
            'discriminator_loss',
            'fgm_terms',
            'generator_gan_loss',
        ],
        'networks': ['AdaLNMLP', 'EDMUNet', 'EDMVelocity', 'UNetVelocity'],
        'preprocessor': ['ImagePreprocessor', 'from_uint8'],
        'sampling': ['Sampler', 'Sampling', 'bf16_autocast'],
        'weights': [
            'STATE_DICT',
            'SafePlanner',
            'SafeReader',
            'check_finite',
            'fingerprint',
            'latest_checkpoint',
            'load_network',
            'load_tensors',
            'read_pickle',
            'read_state_dict',
            'sharded_shapes',
        ],
    },
)
