# Copyright (c) mmfgm authors.
from .config import read_config
from .export import export_generator
from .inferencer import FGMInferencer
from .pipeline import OneStepPipeline
from .sampling_model import SamplingModel

__all__ = ['FGMInferencer', 'OneStepPipeline', 'SamplingModel', 'export_generator', 'read_config']
