# Copyright (c) mmfgm authors.
import json
import os.path as osp
from typing import Any

from mmfgm.errors import UsageError
from mmfgm.files import read_json
from mmfgm.models import FewStepGenerator, without_adapters

from ..artifacts import PIPELINE_FILE
from ..card import hash_weights
from .exporter import HERE, BaseExporter, merged, write_text


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
        bare = self.bare
        ones = (1,) * bare.max_nfe
        if (bare.c_skip, bare.c_out, bare.c_in) != (ones, bare.times, ones):
            raise UsageError(
                "expected a generator of few steps whose steps are the scheduler's own, c_skip = 1,"
                f' c_out = times and c_in = 1, found c_skip={bare.c_skip}, c_out={bare.c_out},'
                f' c_in={bare.c_in}; train with the defaults, or sample this one with FGMInferencer'
            )

    def write(
        self, generator: FewStepGenerator, folder: str, source: dict[str, Any]
    ) -> dict[str, Any]:
        from diffusers import FlowMatchLCMScheduler

        family = self.family
        network = without_adapters(generator.network)
        family.check_architecture(network, self.local, self.base)
        module = getattr(merged(generator).network, family.attribute).to(self.torch_dtype)
        family.save(module, network, folder, self.max_shard_size)
        self.copy_parts(folder, but=[family.subfolder, 'scheduler'])
        # the times are given as they are
        FlowMatchLCMScheduler(shift=1.0).save_pretrained(osp.join(folder, 'scheduler'))
        index = osp.join(folder, PIPELINE_FILE)
        parts = read_json(index, 'download the base again', dict)
        parts['scheduler'] = ['diffusers', FlowMatchLCMScheduler.__name__]
        write_text(index, json.dumps(parts, indent=2) + '\n')
        weights = hash_weights(osp.join(folder, family.subfolder))
        call = {**family.call_options(network), 'sigmas': [round(t, 6) for t in generator.times]}
        del call['num_inference_steps']
        usage = 'import torch\n' + family.usage(
            HERE, network, options=f', torch_dtype={self.torch_dtype}', call=call
        )
        self.write_about(folder, usage, source, weights)
        described = dict(type='FewStepGenerator', times=list(generator.times))
        return dict(
            model=dict(type='FGM', network=family.exported(network), generator=described),
            weights_sha256=weights,
        )
