# Copyright (c) mmfgm authors.
import json
import os.path as osp
from typing import Any

from torch import nn

from mmfgm.errors import UsageError
from mmfgm.files import read_json
from mmfgm.models import FewStepGenerator, without_adapters
from mmfgm.models.families import DiffusersFamily, diffusers_module

from ..artifacts import PIPELINE_FILE
from ..card import hash_weights
from .exporter import HERE, BaseExporter, merged, write_text

# diffusers' class, told the times as they are
SCHEDULER = 'FlowMatchLCMScheduler'


def check_steps(bare: FewStepGenerator) -> None:
    """Raise a UsageError if a step is anything but the network's own estimate ``x_t - t v(x_t,
    t)``, which is all that the scheduler computes."""
    ones = (1,) * bare.max_nfe
    if (bare.c_skip, bare.c_out, bare.c_in) != (ones, bare.times, ones):
        raise UsageError(
            "expected a generator of few steps whose steps are the scheduler's own, c_skip = 1,"
            f' c_out = times and c_in = 1, found c_skip={bare.c_skip}, c_out={bare.c_out},'
            f' c_in={bare.c_in}; train with the defaults, or sample this one with FGMInferencer'
        )


def call_options(
    family: DiffusersFamily, network: nn.Module, bare: FewStepGenerator
) -> dict[str, Any]:
    """Arguments with which the stock pipeline, with that scheduler, is the generator."""
    options = {**family.call_options(network), 'sigmas': [round(t, 6) for t in bare.times]}
    del options['num_inference_steps']
    return options


def described(
    family: DiffusersFamily, network: nn.Module, bare: FewStepGenerator
) -> dict[str, Any]:
    """The model of an export's description."""
    generator = dict(type='FewStepGenerator', times=list(bare.times))
    return dict(type='FGM', network=family.exported(network), generator=generator)


class FewStepPipelineExporter(BaseExporter):
    """The base's pipeline with the generator's network and diffusers' ``FlowMatchLCMScheduler``,
    for plain diffusers: called with ``sigmas``, the generator's times or the first of them, it is
    the generator.

    One network is called at every time, so nothing can be folded into its weights.

    Raises:
        UsageError: If a step is anything but the network's own estimate ``x_t - t v(x_t, t)``,
            which is all that the scheduler computes.
    """

    kind = 'pipeline'

    def __init__(self, *args: Any, max_shard_size: str = '10GB'):
        super().__init__(*args)
        self.max_shard_size = max_shard_size
        check_steps(self.bare)

    def write(
        self, generator: FewStepGenerator, folder: str, source: dict[str, Any]
    ) -> dict[str, Any]:
        family = self.family
        network = without_adapters(generator.network)
        family.check_architecture(network, self.local, self.base)
        module = getattr(merged(generator).network, family.attribute).to(self.torch_dtype)
        family.save(module, network, folder, self.max_shard_size)
        self.copy_parts(folder, but=[family.subfolder, 'scheduler'])
        scheduler = getattr(diffusers_module(), SCHEDULER)(shift=1.0)
        scheduler.save_pretrained(osp.join(folder, 'scheduler'))
        index = osp.join(folder, PIPELINE_FILE)
        parts = read_json(index, 'download the base again', dict)
        parts['scheduler'] = ['diffusers', SCHEDULER]
        write_text(index, json.dumps(parts, indent=2) + '\n')
        weights = hash_weights(osp.join(folder, family.subfolder))
        usage = 'import torch\n' + family.usage(
            HERE,
            network,
            options=f', torch_dtype={self.torch_dtype}',
            call=call_options(family, network, generator),
        )
        self.write_about(folder, usage, source, weights)
        return dict(model=described(family, network, generator), weights_sha256=weights)
