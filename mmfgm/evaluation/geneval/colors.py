# Copyright (c) mmfgm authors.
"""GenEval's colour classifier: CLIP on objects cut out by their masks."""

import os.path as osp
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.models import check_finite, read_state_dict
from mmfgm.registry import TASK_UTILS

from ..features import full_precision
from .judging.prompts import COLORS

TEMPLATES = (
    'a photo of a {color} {name}',
    'a photo of a {color}-colored {name}',
    'a photo of a {color} object',
)
# of the pixels outside the mask, #999
BACKGROUND = 153

# image (H, W, 3) uint8, boxes (n, 5), masks (n, H, W) bool, class name
Request = tuple[np.ndarray, np.ndarray, np.ndarray, str]


def cut_out(image: np.ndarray, box: Sequence[float], mask: np.ndarray) -> Image.Image:
    """What is in a box of an image, grey outside the mask.

    Args:
        image (np.ndarray): ``(H, W, 3)``, uint8.
        box (Sequence[float]): ``x1, y1, x2, y2, ...`` in pixels, rounded here.
        mask (np.ndarray): ``(H, W)``, bool.
    """
    masked = Image.fromarray(np.where(mask[..., None], image, np.uint8(BACKGROUND)))
    return masked.crop(tuple(round(float(value)) for value in box[:4]))


@TASK_UTILS.register_module()
class ClipColors:
    """Names the colour of detected objects, one of GenEval's ten, by CLIP of the open_clip library.

    Args:
        model (str): Name in open_clip. Defaults to ``'ViT-L-14-quickgelu'``, the network of
            OpenAI's weights; the plain ``'ViT-L-14'`` has another activation, with which other
            colours come out.
        pretrained (str): ``'openai'``, another of open_clip's names, or a local file of weights.
            Defaults to ``'openai'``.
        batch_size (int): Objects that go through the network together. Defaults to 64.
        device (str or torch.device, optional): Where the network starts. Defaults to the CPU; see
            :meth:`to`.

    Raises:
        UsageError: If open_clip is missing, the weights cannot be had or are of another network, or
            OpenAI's weights are asked for in a network without QuickGELU.
    """

    def __init__(
        self,
        model: str = 'ViT-L-14-quickgelu',
        pretrained: str = 'openai',
        batch_size: int = 64,
        device: str | torch.device | None = None,
    ):
        try:
            import open_clip
        except ImportError as e:
            raise UsageError(
                f'GenEval names colours with open_clip, which does not import ({e}): pip install '
                '"mmfgm[geneval]"'
            ) from e
        config = open_clip.get_model_config(model)
        if config is None:
            raise UsageError(f'open_clip knows no model {model!r}; GenEval uses ViT-L-14-quickgelu')
        if pretrained == 'openai' and not config.get('quick_gelu'):
            raise UsageError(
                f"OpenAI's weights need QuickGELU, which open_clip's {model!r} does not have, so"
                f" its colours would be others than GenEval's; use {model + '-quickgelu'!r}"
            )
        if batch_size < 1:
            raise UsageError(f'batch_size must be at least 1, but is {batch_size}')
        if osp.isfile(pretrained):
            # says what is wrong with a file that holds more than tensors
            check_finite(read_state_dict(pretrained), pretrained)
        try:
            self.network, _, self.transform = open_clip.create_model_and_transforms(
                model, pretrained=pretrained
            )
        except (RuntimeError, OSError, KeyError, ValueError) as e:
            raise UsageError(
                f'open_clip cannot load the weights {pretrained!r} of {model!r}:'
                f" {str(e).strip()[:400]}\nName a file of this network's weights, or one of"
                " open_clip's names and have a connection:"
                f' {open_clip.list_pretrained_tags_by_model(model)}'
            ) from e
        # open_clip returns some networks ready to train
        self.network.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.label = f'{model} of open_clip with the weights {osp.basename(pretrained)}'
        self.batch_size = batch_size
        self._text: dict[str, Tensor] = {}
        self.to(device or 'cpu')

    def to(self, device: str | torch.device) -> 'ClipColors':
        """Move the network, and return self."""
        self.device = torch.device(device)
        self.network.to(self.device)
        self._text = {name: vectors.to(self.device) for name, vectors in self._text.items()}
        return self

    def _autocast(self) -> torch.autocast:
        # as in the reference, whose networks run on a GPU only
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == 'cuda')

    @torch.inference_mode()
    def text_vectors(self, class_name: str) -> Tensor:
        """Unit vectors ``(10, D)``, one per colour, of a class; computed once."""
        if class_name not in self._text:
            texts = [
                template.format(color=color, name=class_name)
                for color in COLORS
                for template in TEMPLATES
            ]
            with full_precision(), self._autocast():
                embeddings = self.network.encode_text(self.tokenizer(texts).to(self.device))
                mean = (
                    F.normalize(embeddings, dim=-1)
                    .unflatten(0, (len(COLORS), len(TEMPLATES)))
                    .mean(1)
                )
                self._text[class_name] = F.normalize(mean, dim=-1)
        return self._text[class_name]

    @torch.inference_mode()
    def _choose(self, crops: Tensor, names: list[str]) -> list[str]:
        with full_precision(), self._autocast():
            features = F.normalize(self.network.encode_image(crops.to(self.device)), dim=-1)
            logits = torch.cat(
                [
                    100.0 * feature[None] @ self.text_vectors(name).T
                    for feature, name in zip(features, names)
                ]
            )
        # of equal colours the first, which numpy promises
        return [COLORS[index] for index in logits.float().cpu().numpy().argmax(1)]

    def classify(self, requests: Sequence[Request]) -> list[list[str]]:
        """The colours of objects, of all requests together in batches.

        Args:
            requests (Sequence[tuple]): Of an image ``(H, W, 3)`` uint8, boxes ``(n, 5)`` of rows
                ``x1, y1, x2, y2, score`` in pixels, masks ``(n, H, W)`` bool, and the name of their
                class.

        Returns:
            list[list[str]]: For each request the colour of each box.

        Raises:
            UsageError: If boxes, masks and image of a request do not fit together.
        """
        for image, boxes, masks, name in requests:
            if len(boxes) != len(masks) or (len(masks) and masks.shape[1:] != image.shape[:2]):
                raise UsageError(
                    f'masks of {name} must be {(len(boxes), *image.shape[:2])} for {len(boxes)}'
                    f' boxes in an image {image.shape}, but are {masks.shape}'
                )

        objects = [
            (image, box, mask, name)
            for image, boxes, masks, name in requests
            for box, mask in zip(boxes, masks)
        ]
        colors = []
        for start in range(0, len(objects), self.batch_size):
            batch = objects[start : start + self.batch_size]
            crops = torch.stack(
                [self.transform(cut_out(image, box, mask)) for image, box, mask, _ in batch]
            )
            colors += self._choose(crops, [name for *_, name in batch])
        remaining = iter(colors)
        return [[next(remaining) for _ in boxes] for _, boxes, _, _ in requests]
