# Copyright (c) mmfgm authors.
import os.path as osp
from typing import Any

from mmfgm.models import OneStepGenerator, without_adapters

from ..card import hash_weights
from .exporter import HERE, BaseExporter, merged


class PipelineExporter(BaseExporter):
    """The base's pipeline with the generator folded into its network, for plain diffusers; in one
    step it is the generator.

    Raises:
        UsageError: If no change of weights turns the step into the generator.
    """

    kind = 'pipeline'

    def __init__(self, *args: Any, max_shard_size: str = '10GB'):
        super().__init__(*args)
        self.max_shard_size = max_shard_size
        # what the base computes in one step
        self.step = self.family.step(self.local)
        self.step.check(self.bare)

    def write(
        self, generator: OneStepGenerator, folder: str, source: dict[str, Any]
    ) -> dict[str, Any]:
        family = self.family
        network = without_adapters(generator.network)
        family.check_architecture(network, self.local, self.base)
        # before merging, which computes in float32
        trained_in = family.weights_dtype(network)
        module = family.fold(merged(generator), self.step, self.torch_dtype, trained_in)
        family.save(module, network, folder, self.max_shard_size)
        self.copy_parts(folder, but=[family.subfolder])
        weights = hash_weights(osp.join(folder, family.subfolder))
        usage = 'import torch\n' + family.usage(
            HERE, network, options=f', torch_dtype={self.torch_dtype}'
        )
        self.write_about(folder, usage, source, weights)
        folded = dict(t_star=self.step.timestep / 1000, c_out=self.step.scale)
        return dict(
            model=dict(type='FGM', network=family.exported(network), generator=folded),
            weights_sha256=weights,
        )
