# Copyright (c) mmfgm authors.
from .guidance import ClassifierFreeGuidance, NullLabel
from .ode import CountNFE, euler, heun, shifted_times, uniform_times
from .path import LinearPath, PathSample, expand_t
from .time_samplers import LogitNormal, Uniform

__all__ = [
    'ClassifierFreeGuidance',
    'CountNFE',
    'LinearPath',
    'LogitNormal',
    'NullLabel',
    'PathSample',
    'Uniform',
    'euler',
    'expand_t',
    'heun',
    'shifted_times',
    'uniform_times',
]
