# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'config': ['read_config'],
        'export': ['export_generator'],
        'inferencer': ['FGMInferencer'],
        'pipeline': ['OneStepPipeline'],
        'sampling_model': ['SamplingModel'],
        'schema': ['allow_in_exports'],
    },
)
