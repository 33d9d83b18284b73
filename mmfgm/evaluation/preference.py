# Copyright (c) mmfgm authors.
"""How well images suit their prompts, how much those of one prompt differ, and a distance to real
images on features that saw no labels."""

import json
import zlib
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.device import get_device
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from mmfgm.errors import UsageError
from mmfgm.models import fingerprint
from mmfgm.registry import DATASETS, METRICS, TASK_UTILS

from .features import full_precision
from .metrics import FrechetDistance, GatheredMetric
from .pretrained import PART, load_judge, load_lpips, rgb_parts

# of the network that PickScore was fine-tuned from; its authors prepare inputs with it
PICK_PROCESSOR = 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'


class _Prompted(GatheredMetric):
    """A metric of images and their prompts, which are those of the evaluation's dataset; it must
    have a ``row(idx)`` with ``prompt``."""

    def __init__(self, prompts: dict | None):
        super().__init__()
        self.dataset: Any = None
        if prompts:
            self._take(DATASETS.build(prompts))

    def _take(self, dataset: Any) -> None:
        if not hasattr(dataset, 'row'):
            raise UsageError(
                f'{type(self).__name__} needs a dataset that knows its prompts, such as'
                f' GenEvalPrompts or ShapePrompts, but got {type(dataset).__name__}; name one by'
                ' `prompts`'
            )
        self.dataset = dataset

    def bind(self, dataset: Any) -> None:
        """Take the prompts from the evaluation's dataset, unless others were named.

        Raises:
            UsageError: If it has none, or another length than that of ``prompts``.
        """
        if self.dataset is None:
            self._take(dataset)
        elif len(self.dataset) != len(dataset):
            raise UsageError(
                f'{type(self).__name__} has {len(self.dataset)} prompts for {len(dataset)} samples;'
                " give `prompts` the config of the evaluation's dataset, or leave it out"
            )


class _PromptScore(_Prompted):
    """The mean over images of what a CLIP says about an image and its prompt."""

    def __init__(self, pretrained: str, prompts: dict | None, processor: str | None):
        super().__init__(prompts)
        self.network, self.processor = load_judge(
            type(self).__name__, pretrained, 'clip', 'CLIPModel', processor
        )
        self.max_length = self.network.config.text_config.max_position_embeddings

    def release(self) -> None:
        self.network.to('cpu')

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        idx, samples = self.real(data_batch, data_samples)
        if not idx:
            return
        device = get_device()
        network = self.network.to(device)
        texts = [self.dataset.row(i)['prompt'] for i in idx]
        values: list[Tensor] = []
        with torch.no_grad(), full_precision():
            for images in rgb_parts(type(self).__name__, samples):
                done = sum(map(len, values))
                inputs = self.processor(
                    text=texts[done : done + len(images)],
                    images=images,
                    return_tensors='pt',
                    padding=True,
                    truncation=True,
                    max_length=self.max_length,
                ).to(device)
                out = network(**inputs)
                cosine = (
                    F.normalize(out.image_embeds, dim=-1) * F.normalize(out.text_embeds, dim=-1)
                ).sum(1)
                values.append(self.score(cosine).float().cpu())
        self.results.append((torch.tensor(idx), torch.cat(values)))

    def score(self, cosine: Tensor) -> Tensor:
        """Values ``(N,)`` of cosines ``(N,)`` between images and prompts."""
        raise NotImplementedError

    def compute(self, values: Tensor) -> dict[str, float]:
        return {self.name: float(values.double().mean())}


@METRICS.register_module()
class CLIPScore(_PromptScore):
    """CLIPScore (Hessel et al., 2021) as torchmetrics has it: 100 times the mean cosine between
    images and prompts, and no less than 0.

    Args:
        pretrained (str): Hub id or local folder of a CLIP in the format of transformers; values of
            different ones do not compare. Defaults to ``'openai/clip-vit-large-patch14'``.
        prompts (dict, optional): Config of a dataset whose ``row(idx)`` has the ``prompt``.
            Defaults to the evaluation's own.

    Raises:
        UsageError: If transformers or the weights are missing, or are of another model.
    """

    name = 'clip_score'

    def __init__(
        self, pretrained: str = 'openai/clip-vit-large-patch14', prompts: dict | None = None
    ):
        super().__init__(pretrained, prompts, None)

    def score(self, cosine: Tensor) -> Tensor:
        return 100 * cosine

    def compute(self, values: Tensor) -> dict[str, float]:
        return {self.name: max(super().compute(values)[self.name], 0.0)}


@METRICS.register_module()
class PickScore(_PromptScore):
    """PickScore (Kirstain et al., 2023): the mean of ``exp(logit_scale)`` times the cosine, by a
    CLIP-H that learnt which of two images people prefer.

    Args:
        pretrained (str): Hub id or local folder. Defaults to ``'yuvalkirstain/PickScore_v1'``.
        prompts (dict, optional): As for :class:`CLIPScore`.
        processor (str, optional): Hub id or local folder of what prepares inputs. Defaults to its
            authors' for their hub id, and to ``pretrained`` otherwise.

    Raises:
        UsageError: If transformers or the weights are missing, or are of another model.
    """

    name = 'pick_score'

    def __init__(
        self,
        pretrained: str = 'yuvalkirstain/PickScore_v1',
        prompts: dict | None = None,
        processor: str | None = None,
    ):
        if pretrained == 'yuvalkirstain/PickScore_v1':
            processor = processor or PICK_PROCESSOR
        super().__init__(pretrained, prompts, processor)

    def score(self, cosine: Tensor) -> Tensor:
        return self.network.logit_scale.exp() * cosine


@METRICS.register_module()
class PairwiseLPIPS(_Prompted):
    """Diversity: the mean LPIPS distance (Zhang et al., 2018) of two images of one prompt, by
    their ``lpips`` and AlexNet; distillation tends to lower it.

    Every pair of a prompt counts alike, and every prompt with two images or more.

    Args:
        size (int): Images are resized to so many pixels a side first, antialiased; values of
            different sizes do not compare. Defaults to 256.
        alexnet (str, optional): File of torchvision's AlexNet weights. Defaults to a download by
            torchvision.
        prompts (dict, optional): As for :class:`CLIPScore`.

    Raises:
        UsageError: If lpips or the weights are missing, or are of another network.
    """

    name = 'pairwise_lpips'
    min_samples = 2

    def __init__(self, size: int = 256, alexnet: str | None = None, prompts: dict | None = None):
        super().__init__(prompts)
        # of AlexNet's strides and pooling, nothing is left of fewer
        if size < 32:
            raise UsageError(f'expected PairwiseLPIPS.size of at least 32, found {size}; raise it')
        self.size = size
        self.network = load_lpips(alexnet)

    def extract(self, samples: Tensor) -> Tensor:
        parts = [torch.stack(part) for part in rgb_parts(type(self).__name__, samples)]
        shape = [self.size, self.size]
        return torch.cat([resize(part, shape, antialias=True) for part in parts])

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        idx, samples = self.real(data_batch, data_samples)
        if idx:
            # bytes: a thousand images of 1024 pixels would not fit otherwise
            self.results.append((torch.tensor(idx), self.extract(samples)))

    def compute(self, values: Tensor) -> dict[str, float]:
        groups = defaultdict(list)
        for i in range(len(values)):
            groups[self.dataset.row(i)['prompt']].append(i)
        distances = [
            self._mean_distance(values[group]) for group in groups.values() if len(group) > 1
        ]
        if not distances:
            raise UsageError(
                'PairwiseLPIPS compares images of one prompt, but no prompt has two; raise'
                ' samples_per_prompt of the dataset'
            )
        return {self.name: sum(distances) / len(distances)}

    def _mean_distance(self, images: Tensor) -> float:
        device = get_device()
        network = self.network.to(device)
        first, second = torch.triu_indices(len(images), len(images), 1)
        total = 0.0
        with torch.no_grad(), full_precision():
            for i, j in zip(first.split(PART), second.split(PART)):
                a, b = (images[k].to(device).float() / 127.5 - 1 for k in (i, j))
                total += float(network(a, b).double().sum())
        return total / len(first)


@TASK_UTILS.register_module()
class DINOv2:
    """The class token of a DINOv2 after its last norm, on images as its own processor prepares
    them.

    Args:
        pretrained (str): Hub id or local folder in the format of transformers. Defaults to
            ``'facebook/dinov2-large'``.

    Raises:
        UsageError: If transformers or the weights are missing, or are of another model.
    """

    def __init__(self, pretrained: str = 'facebook/dinov2-large'):
        self.network, self.processor = load_judge('DINOv2', pretrained, 'dinov2', 'Dinov2Model')
        self.dim = self.network.config.hidden_size
        # statistics of other weights, or of images prepared otherwise, must not be taken for these
        prepared = json.dumps(self.processor.to_dict(), sort_keys=True, default=str).encode()
        self.name = f'dinov2-{fingerprint(self.network)}-{zlib.crc32(prepared):08x}'

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Features ``(N, dim)`` of images ``(N, 3, H, W)``, uint8 or in [-1, 1]."""
        device = get_device()
        network = self.network.to(device)
        with full_precision():
            return torch.cat(
                [
                    network(
                        **self.processor(images=images, return_tensors='pt').to(device)
                    ).pooler_output
                    for images in rgb_parts('DINOv2', samples)
                ]
            )


@METRICS.register_module()
class FDDINOv2(FrechetDistance):
    """Fréchet distance on DINOv2's features, which ranks images more as people do than Inception's.

    Values compare only with those of the same weights and the same preparation of images.

    Args:
        reference (dict | str): As for :class:`FrechetDistance`.
        feature (dict, optional): Config of the feature function. Defaults to
            ``dict(type='DINOv2')``.
    """

    name = 'fd_dinov2'

    def __init__(self, reference: dict | str, feature: dict | None = None):
        super().__init__(reference, feature or dict(type='DINOv2'))
