# Copyright (c) mmfgm authors.
from typing import Any

from mmengine.config import Config
from torch import nn

from mmfgm.errors import UsageError
from mmfgm.models import without_adapters
from mmfgm.models.families import DiffusersFamily

from ..card import hash_weights
from .exporter import HERE, BaseExporter
from .few_step import SCHEDULER, call_options, check_steps, described

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
        self.check_generator()
        teacher = cfg.model['teacher'].get('checkpoint')
        if teacher is not None:
            raise UsageError(
                f'the adapters belong to the teacher of {teacher!r}, not to {base!r}; leave --lora'
                ' out to export the merged transformer'
            )

    def check_generator(self) -> None:
        """Compare the generator with what the pipeline does."""
        step, generator = self.family.step(self.local), self.bare
        step.check(generator)
        if not step.is_generator(generator):
            raise UsageError(
                'adapters alone cannot hold what is folded into other weights:'
                f' t_star={generator.t_star}, c_in={generator.c_in}, '
                f"c_out={generator.c_out}, c_skip={generator.c_skip}, and the pipeline's step has"
                ' 1.0 for each; leave --lora out to export the merged transformer'
            )

    def usage(self, network: nn.Module, *lines: str) -> str:
        """Python for the card; ``lines`` come after the pipeline is opened."""
        return self.family.usage(self.public_base, network, *lines)

    def described(self, network: nn.Module) -> dict[str, Any]:
        """The model of the export's description."""
        return dict(type='FGM', network=self.family.exported(network))

    def write(self, generator: nn.Module, folder: str, source: dict[str, Any]) -> dict[str, Any]:
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
        usage = self.usage(network, f'pipe.load_lora_weights({HERE!r})')
        self.write_about(folder, usage, source, weights)
        return dict(model=self.described(network), weights_sha256=weights)


class FewStepLoRAExporter(LoRAExporter):
    """The adapters of a generator of few steps; its card names the scheduler and the times with
    which the base's pipeline is the generator."""

    def check_generator(self) -> None:
        check_steps(self.bare)

    def usage(self, network: nn.Module, *lines: str) -> str:
        return self.family.usage(
            self.public_base,
            network,
            *lines,
            f'from diffusers import {SCHEDULER}',
            f'pipe.scheduler = {SCHEDULER}(shift=1.0)',
            call=call_options(self.family, network, self.bare),
        )

    def described(self, network: nn.Module) -> dict[str, Any]:
        return described(self.family, network, self.bare)
