# Copyright (c) mmfgm authors.
from .evaluate import Evaluation, build_evaluations
from .frechet import GaussianStats, Moments, frechet_distance
from .metrics import FrechetDistance, Pixels, SampleMetric, SlicedWasserstein
from .pictures import draw_over_nfe, draw_panels, to_uint8
from .wasserstein import sliced_wasserstein

__all__ = [
    'Evaluation', 'FrechetDistance', 'GaussianStats', 'Moments', 'Pixels', 'SampleMetric', 'SlicedWasserstein',
    'build_evaluations', 'draw_over_nfe', 'draw_panels', 'frechet_distance', 'sliced_wasserstein', 'to_uint8'
]
