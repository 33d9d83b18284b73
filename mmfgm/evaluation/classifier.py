# Copyright (c) mmfgm authors.
"""A small classifier, whose features stand for Inception's where images are small or grey, and what
it says about samples with labels."""

from collections.abc import Sequence

import torch
from mmengine.device import get_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.files import asset_path, parse_json
from mmfgm.files import sha256 as file_sha256
from mmfgm.models import from_uint8, load_network
from mmfgm.registry import METRICS, TASK_UTILS

from .features import build_feature, full_precision, to_uint8
from .metrics import GatheredMetric


class ConvClassifier(nn.Module):
    """Three convolutions and two layers, 0.2 M parameters at 28x28; for images of 8 pixels and
    more.

    Args:
        event_shape (Sequence[int]): ``(C, H, W)`` of the images.
        num_classes (int): Number of classes.
        dim (int): Number of features. Defaults to 64.
    """

    def __init__(self, event_shape: Sequence[int], num_classes: int, dim: int = 64):
        super().__init__()
        channels, *size = event_shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * ((size[0] + 3) // 4) * ((size[1] + 3) // 4), dim),
        )
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(N, dim)``, before the rectifier so that each of them varies, and logits ``(N,
        num_classes)`` of images ``(N, C, H, W)`` in [-1, 1]."""
        features = self.layers(images)
        return features, self.head(features.relu())


@TASK_UTILS.register_module()
class ClassifierFeatures:
    """The last hidden layer of a classifier that ``tools/train_classifier.py`` trained.

    Args:
        weights (str): Its file, or ``mmfgm::assets/...`` of one that comes with mmfgm.

    Attributes:
        name (str): Tells the features of one file of weights from all others.
        about (dict): What the tool wrote: ``event_shape``, ``num_classes``, ``dim`` and the
            ``accuracy`` on images that it did not see.

    Raises:
        UsageError: If the file is missing or no such classifier.
    """

    def __init__(self, weights: str):
        path = asset_path(weights)
        try:
            self.name = f'classifier-{file_sha256(path)[:8]}'
            with safe_open(path, 'pt') as file:
                self.about = parse_json((file.metadata() or {})['classifier'], dict)
            shape, classes, self.dim = (
                self.about[key] for key in ('event_shape', 'num_classes', 'dim')
            )
            network = ConvClassifier(shape, classes, self.dim)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as e:
            raise UsageError(
                f'{weights!r} is no classifier of ours ({type(e).__name__}: {e}); make one with'
                ' tools/train_classifier.py'
            ) from e
        self.event_shape = tuple(shape)
        self.network = load_network(network, path).eval()
        self._last: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())

    @torch.no_grad()
    def _run(self, samples: Tensor) -> tuple[Tensor, ...]:
        # several metrics ask about one batch
        if self._last[0] is not samples:
            if tuple(samples.shape[1:]) != self.event_shape:
                raise UsageError(
                    f'{self.name} knows images of shape {self.event_shape}, but the samples have'
                    f' {tuple(samples.shape[1:])}; train one on such images with'
                    ' tools/train_classifier.py'
                )
            images = from_uint8(to_uint8(samples)).to(get_device())
            with full_precision():
                parts = [self.network.to(images.device)(part) for part in images.split(500)]
            self._last = (samples, tuple(torch.cat(part) for part in zip(*parts)))
        return self._last[1]

    def __call__(self, samples: Tensor) -> Tensor:
        """Features ``(N, dim)`` of images ``(N, C, H, W)``, uint8 or in [-1, 1]."""
        return self._run(samples)[0]

    def logits(self, samples: Tensor) -> Tensor:
        """Logits ``(N, num_classes)``."""
        return self._run(samples)[1]


@METRICS.register_module()
class LabelAgreement(GatheredMetric):
    """The fraction of samples in which a classifier sees the class that they were made for.

    Args:
        feature (dict): Config of a feature function with ``logits``, for example
            ``dict(type='ClassifierFeatures', weights=...)``.

    Raises:
        UsageError: If it has none; while samples come in, if they have no labels.
    """

    name = 'agreement'

    def __init__(self, feature: dict):
        super().__init__()
        self.feature = build_feature(feature)
        if not hasattr(self.feature, 'logits'):
            raise UsageError(
                'LabelAgreement needs a feature function with logits, which'
                f' {type(self.feature).__name__} has not; use ClassifierFeatures'
            )

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        labels = data_batch.get('cond', {}).get('labels')
        if labels is None:
            raise UsageError(
                'LabelAgreement needs samples with labels, but these have none; give the'
                " evaluation's dataset num_classes, or leave the metric out"
            )
        idx, samples = self.real(data_batch, data_samples)
        if idx:
            asked = labels.cpu()[
                [row for row, i in enumerate(data_batch['idx']) if int(i) < self.num_samples]
            ]
            seen = self.feature.logits(samples).argmax(1).cpu()
            self.results.append((torch.tensor(idx), (seen == asked).float()))

    def compute(self, values: Tensor) -> dict[str, float]:
        return {self.name: float(values.mean())}
