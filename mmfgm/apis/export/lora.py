# Copyright (c) mmfgm authors.
from typing import Any

from mmengine.config import Config

from mmfgm.errors import UsageError
from mmfgm.models import OneStepGenerator, without_adapters
from mmfgm.models.families import DiffusersFamily

from ..card import hash_weights
from .exporter import HERE, BaseExporter

LORA_FILE = 'pytorch_lora_weights.safetensors'


class LoRAExporter(BaseExporter):
    """The adapters alone, for the ``load_lora_weights`` of the base's pipeline.

    Raises:
        UsageError: If adapters cannot hold the generator: it differs from its network by more than
            them, or they belong to other weights than the base's.
    """

    kind = 'lora'

    def __init__(self, cfg: Config, dtype: str, family: DiffusersFamily, base: str):
        super().__init__(cfg, dtype, family, base)
        self.step = family.step(self.local)
        self.step.check(self.bare)
        generator = self.bare
        teacher = cfg.model['teacher'].get('checkpoint')
        if not self.step.is_generator(generator):
            raise UsageError(
                'adapters alone cannot hold what is folded into other weights:'
                f' t_star={generator.t_star}, c_in={generator.c_in}, '
                f"c_out={generator.c_out}, c_skip={generator.c_skip}, and the pipeline's step has"
                ' 1.0 for each; leave --lora out to export the merged transformer'
            )
        if teacher is not None:
            raise UsageError(
                f'the adapters belong to the teacher of {teacher!r}, not to {base!r}; leave --lora'
                ' out to export the merged transformer'
            )

    def write(
        self, generator: OneStepGenerator, folder: str, source: dict[str, Any]
    ) -> dict[str, Any]:
        family = self.family
        network = without_adapters(generator.network)
        tensors = {}
        for name, adapter in generator.network.adapters.items():
            layer = name.removeprefix(f'{family.attribute}.')
            # readers take alpha for the rank, so its ratio goes into one of the matrices
            for matrix, scale in (('lora_A', 1.0), ('lora_B', adapter.scaling)):
                weight = getattr(adapter, matrix)['default'].weight.detach()
                tensors[f'{layer}.{matrix}.weight'] = (weight * scale).to(self.torch_dtype)
        family.save_adapters(tensors, folder, LORA_FILE)
        weights = hash_weights(folder)
        usage = family.usage(self.public_base, network, f'pipe.load_lora_weights({HERE!r})')
        self.write_about(folder, usage, source, weights)
        return dict(
            model=dict(type='FGM', network=family.exported(network)), weights_sha256=weights
        )
