# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'classifier': ['ClassifierFeatures', 'ConvClassifier', 'LabelAgreement'],
        'evaluate': ['Evaluation', 'build_evaluations'],
        'features': ['InceptionV3', 'Pixels', 'build_feature', 'to_uint8'],
        'fid': ['FID', 'KID', 'InceptionScore', 'PrecisionRecall'],
        'frechet': ['StreamingMoments', 'frechet_distance'],
        'metrics': ['FrechetDistance', 'GatheredMetric', 'SampleMetric', 'SlicedWasserstein'],
        'pictures': ['draw_captioned', 'draw_over_nfe', 'draw_panels'],
        'preference': ['CLIPScore', 'DINOv2', 'FDDINOv2', 'PairwiseLPIPS', 'PickScore'],
        'reference': ['Reference', 'load_reference', 'save_reference'],
        'shapes': ['ShapeQuality', 'ShapeScore'],
        'wasserstein': ['sliced_wasserstein'],
    },
)
