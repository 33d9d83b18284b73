# Copyright (c) mmfgm authors.
from .evaluate import Evaluation, build_evaluations
from .features import InceptionV3, Pixels, build_feature, to_uint8
from .fid import FID, KID, InceptionScore, PrecisionRecall
from .frechet import StreamingMoments, frechet_distance
from .metrics import FrechetDistance, GatheredMetric, SampleMetric, SlicedWasserstein
from .pictures import draw_over_nfe, draw_panels
from .reference import Reference, load_reference, save_reference
from .shapes import ShapeScore
from .wasserstein import sliced_wasserstein

__all__ = [
    'FID',
    'KID',
    'Evaluation',
    'FrechetDistance',
    'GatheredMetric',
    'InceptionScore',
    'InceptionV3',
    'Pixels',
    'PrecisionRecall',
    'Reference',
    'SampleMetric',
    'ShapeScore',
    'SlicedWasserstein',
    'StreamingMoments',
    'build_evaluations',
    'build_feature',
    'draw_over_nfe',
    'draw_panels',
    'frechet_distance',
    'load_reference',
    'save_reference',
    'sliced_wasserstein',
    'to_uint8',
]
