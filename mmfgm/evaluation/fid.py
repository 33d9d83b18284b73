# Copyright (c) mmfgm authors.
"""FID and its kin on Inception features; KID, Inception Score and precision/recall are
torch-fidelity's."""

from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.registry import METRICS

from .features import build_feature
from .metrics import FrechetDistance, GatheredMetric
from .reference import load_reference

INCEPTION = dict(type='InceptionV3')


@METRICS.register_module()
class FID(FrechetDistance):
    """Fréchet Inception Distance (Heusel et al., 2017).

    Args:
        reference (dict | str): Config of a dataset of images, or a ``.npz`` of
            ``tools/fid_stats.py`` or EDM.
        feature (dict): Config of the feature function. Defaults to ``dict(type='InceptionV3')``.
    """

    name = 'fid'

    def __init__(self, reference: dict | str, feature: dict = INCEPTION):
        super().__init__(reference, feature)


class _ReferenceFeatures(GatheredMetric):
    """A metric that compares features with those of the reference, which must have as many."""

    def __init__(self, reference: dict | str, feature: dict):
        super().__init__()
        self.feature = build_feature(feature)
        self.reference = load_reference(reference, self.feature, keep_features=True).features
        if len(self.reference) < self.min_samples:
            raise UsageError(
                f'{type(self).__name__} needs at least {self.min_samples} reference samples, but'
                f' the reference has {len(self.reference)}'
            )

    def extract(self, samples: Tensor) -> Tensor:
        return self.feature(samples)


@METRICS.register_module()
class KID(_ReferenceFeatures):
    """Kernel Inception Distance (Binkowski et al., 2018): mean and deviation over random subsets.

    Args:
        reference (dict | str): As for :class:`FID`; a file must hold features.
        subsets (int): Number of subsets. Defaults to 100.
        subset_size (int): Samples in each. Defaults to 1000.
        feature (dict): Config of the feature function. Defaults to ``dict(type='InceptionV3')``.
    """

    value_names = ('mean', 'std')

    def __init__(
        self,
        reference: dict | str,
        subsets: int = 100,
        subset_size: int = 1000,
        feature: dict = INCEPTION,
    ):
        self.min_samples = self.subset_size = subset_size
        self.subsets = subsets
        super().__init__(reference, feature)

    def compute(self, values: Tensor) -> dict[str, float]:
        from torch_fidelity.metric_kid import (
            KEY_METRIC_KID_MEAN,
            KEY_METRIC_KID_STD,
            kid_features_to_metric,
        )

        # float64: the cubic kernel's sums cancel
        out = kid_features_to_metric(
            values.double(),
            self.reference.double(),
            kid_subsets=self.subsets,
            kid_subset_size=self.subset_size,
            verbose=False,
        )
        return dict(mean=out[KEY_METRIC_KID_MEAN], std=out[KEY_METRIC_KID_STD])


@METRICS.register_module()
class PrecisionRecall(_ReferenceFeatures):
    """Improved precision and recall (Kynkaanniemi et al., 2019), on Inception features.

    Args:
        reference (dict | str): As for :class:`FID`; a file must hold features.
        neighborhood (int): Neighbours that span the manifold. Defaults to 3.
        feature (dict): Config of the feature function. Defaults to ``dict(type='InceptionV3')``.
    """

    value_names = ('precision', 'recall')

    def __init__(self, reference: dict | str, neighborhood: int = 3, feature: dict = INCEPTION):
        self.neighborhood = neighborhood
        self.min_samples = neighborhood + 1
        super().__init__(reference, feature)

    def compute(self, values: Tensor) -> dict[str, float]:
        from torch_fidelity.metric_prc import (
            KEY_METRIC_PRECISION,
            KEY_METRIC_RECALL,
            prc_features_to_metric,
        )

        out = prc_features_to_metric(
            values, self.reference, prc_neighborhood=self.neighborhood, verbose=False
        )
        return dict(
            precision=float(out[KEY_METRIC_PRECISION]), recall=float(out[KEY_METRIC_RECALL])
        )


@METRICS.register_module()
class InceptionScore(GatheredMetric):
    """Inception Score (Salimans et al., 2016): mean and deviation over splits of shuffled samples.

    Args:
        splits (int): Defaults to 10.
        feature (dict): Config of a feature function with ``logits``. Defaults to
            ``dict(type='InceptionV3')``.
    """

    value_names = ('mean', 'std')

    def __init__(self, splits: int = 10, feature: dict = INCEPTION):
        super().__init__()
        self.feature = build_feature(feature)
        self.min_samples = self.splits = splits
        if not hasattr(self.feature, 'logits'):
            raise UsageError(
                'InceptionScore needs a feature function with logits, which '
                f'{type(self.feature).__name__} has not'
            )

    def extract(self, samples: Tensor) -> Tensor:
        return self.feature.logits(samples)

    def compute(self, values: Tensor) -> dict[str, float]:
        from torch_fidelity.metric_isc import (
            KEY_METRIC_ISC_MEAN,
            KEY_METRIC_ISC_STD,
            isc_features_to_metric,
        )

        out = isc_features_to_metric(values, self.splits)
        return dict(mean=out[KEY_METRIC_ISC_MEAN], std=out[KEY_METRIC_ISC_STD])
