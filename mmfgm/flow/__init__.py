# Copyright (c) mmfgm authors.
from .guidance import ClassifierFreeGuidance, NullLabel
from .ode import (
    CountNFE,
    edm_times,
    euler,
    flux_times,
    heun,
    shift_time,
    shifted_times,
    uniform_times,
)
from .path import LinearPath, PathSample, expand_t
from .time_samplers import Beta, EDMGrid, LogitNormal, Uniform
from .weights import (
    SMALLEST_ERROR,
    PowerWeight,
    SiDWeight,
    Weight,
    mean_over_event,
    velocity_error,
    weight_named,
)

__all__ = [
    'SMALLEST_ERROR',
    'Beta',
    'ClassifierFreeGuidance',
    'CountNFE',
    'EDMGrid',
    'LinearPath',
    'LogitNormal',
    'NullLabel',
    'PathSample',
    'PowerWeight',
    'SiDWeight',
    'Uniform',
    'Weight',
    'edm_times',
    'euler',
    'expand_t',
    'flux_times',
    'heun',
    'mean_over_event',
    'shift_time',
    'shifted_times',
    'uniform_times',
    'velocity_error',
    'weight_named',
]
