# Copyright (c) mmfgm authors.
from .config import read_config
from .inferencer import FGMInferencer
from .sampling_model import SamplingModel

__all__ = ['FGMInferencer', 'SamplingModel', 'read_config']
