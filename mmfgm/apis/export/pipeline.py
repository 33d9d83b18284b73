# Copyright (c) mmfgm authors.
import os.path as osp
import shutil
from typing import Any

from mmfgm.models import OneStepGenerator

from ..artifacts import PIPELINE_FILE
from ..card import hash_weights
from .exporter import BaseExporter, merged


class PipelineExporter(BaseExporter):
    """The base's pipeline with the generator folded into its network, for plain diffusers; in one
    step it is the generator."""

    kind = 'pipeline'

    def __init__(self, *args: Any, max_shard_size: str = '10GB'):
        super().__init__(*args)
        self.max_shard_size = max_shard_size

    def write(
        self, generator: OneStepGenerator, folder: str, source: dict[str, Any]
    ) -> dict[str, Any]:
        family = self.family
        network = generator.network
        family.check_architecture(network, self.local, self.base)
        # before merging, which computes in float32
        trained_in = family.weights_dtype(network)
        module = family.fold(merged(generator), self.step, self.torch_dtype, trained_in)
        family.save(module, network, folder, self.max_shard_size)
        for name in family.parts(self.local):
            if name != family.subfolder:
                shutil.copytree(osp.join(self.local, name), osp.join(folder, name))
        shutil.copy(osp.join(self.local, PIPELINE_FILE), folder)
        weights = hash_weights(osp.join(folder, family.subfolder))
        usage = 'import torch\n' + family.usage(
            'THIS FOLDER', options=f', torch_dtype={self.torch_dtype}'
        )
        self.write_about(folder, usage, source, weights)
        folded = dict(t_star=self.step.timestep / 1000, c_out=self.step.scale)
        return dict(
            model=dict(type='FGM', network=family.exported(network), generator=folded),
            weights_sha256=weights,
        )
