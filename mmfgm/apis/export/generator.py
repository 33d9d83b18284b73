# Copyright (c) mmfgm authors.
import os.path as osp
from typing import Any

from mmengine.config import Config
from safetensors.torch import save_file
from torch import nn

from mmfgm.models import without_adapters
from mmfgm.models.families import Family

from ..artifacts import WEIGHTS_FILE
from ..card import hash_weights, write_card
from .exporter import HERE, Exporter, merged, write_text


class GeneratorExporter(Exporter):
    """The generator as one safetensors file, for :class:`~mmfgm.apis.FGMInferencer` and
    :class:`~mmfgm.apis.OneStepPipeline`.

    Args:
        family (Family, optional): Of the network, where it has one. Its pre-trained weights are not
            needed any more, but its text encoders are.
    """

    kind = 'generator'

    def __init__(self, cfg: Config, dtype: str, family: Family | None = None):
        super().__init__(cfg, dtype)
        self.family = family

    def write(self, generator: nn.Module, folder: str, source: dict[str, Any]) -> dict[str, Any]:
        tensors = {
            key: (value.to(self.torch_dtype) if value.is_floating_point() else value).contiguous()
            for key, value in merged(generator).state_dict().items()
        }
        save_file(tensors, osp.join(folder, WEIGHTS_FILE), dict(format='pt'))
        model = {
            key: self.cfg.model[key].to_dict()
            for key in ('network', 'generator', 'decoder')
            if self.cfg.model.get(key)
        }
        encoder = self.cfg.get('text_encoder')
        encoder = encoder.to_dict() if encoder else None
        pretrained = model['network'].get('pretrained')
        if self.family is not None and pretrained:
            model['network'] = self.family.without_weights(model['network'])
            encoder = encoder or dict(family=self.family.name, pretrained=pretrained)
        weights = hash_weights(folder)
        card = write_card(
            self._usage(generator, encoder),
            source,
            weights,
            self.dtype,
            getattr(generator, 'max_nfe', 1),
        )
        write_text(osp.join(folder, 'README.md'), card)
        return dict(model=dict(type='FGM', **model), text_encoder=encoder, weights_sha256=weights)

    @staticmethod
    def _usage(generator: nn.Module, encoder: dict | None) -> str:
        name = 'num_images'
        inputs = '4'
        if encoder:
            name = 'prompt'
            inputs = "'A PROMPT'"
        elif getattr(without_adapters(generator.network), 'num_classes', None):
            name = 'labels'
            inputs = '[0, 1, 2, 3]'
        return f"""
from mmfgm.apis import OneStepPipeline
pipe = OneStepPipeline.from_pretrained({HERE!r})
image = pipe({name}={inputs}, seeds=0).images[0]
image.save('image.png')
"""
