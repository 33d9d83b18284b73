# Copyright (c) mmfgm authors.
"""Draw pairs of noise and sample that a teacher's ODE connects, for ReFlow (Liu et al., 2022)."""

from dataclasses import asdict
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor

from mmfgm.caches import CacheOptions, ShardWriter, write_shards
from mmfgm.datasets import GenerationDataset
from mmfgm.errors import UsageError
from mmfgm.models import Sampling, fingerprint
from mmfgm.processes import is_finite

from .config import building
from .sampling_model import SamplingModel

# Evaluations generate from seed 0: a model that was trained on pairs of the same noise would be
# measured on what it has seen.
SEED = 1


def draw_couplings(
    cfg: Config,
    checkpoint: str,
    out: str,
    num: int,
    network: str | None = None,
    seed: int = SEED,
    precision: str = 'fp32',
    options: CacheOptions | None = None,
    **sampling: Any,
) -> None:
    """Draw couplings into a cache; one that an earlier run began is taken up.

    Item ``i`` starts from the noise of its own seed and has the label that
    :class:`~mmfgm.datasets.GenerationDataset` gives it, so it depends neither on the number of
    processes nor on restarts. Its noise is stored, not only its seed: torch does not promise the
    same numbers in its next version or on another CPU, and a pair with other noise would train
    like ordinary flow matching, which nobody would notice. float16 rounds by at most 2^-11 of a
    value, a sixteenth of the step of an 8-bit pixel where that is largest, in half the space.

    Args:
        cfg (Config): Of the training that made the teacher.
        checkpoint (str): Its checkpoint or work dir.
        out (str): The cache's folder.
        num (int): Pairs.
        network (str, optional): The teacher's name in the checkpoint. Defaults to the first
            average.
        seed (int): Selects the noise. Defaults to 1, which no evaluation uses.
        precision (str): ``'fp32'``, or ``'bf16'`` for bf16 compute. Defaults to ``'fp32'``.
        options (CacheOptions, optional): See there. Defaults to float16, 1,000 pairs a batch and
            10,000 a shard.
        **sampling: Further arguments of :class:`~mmfgm.models.Sampling`: ``nfe``, ``solver``,
            ``shift``, ``spacing``, ``guidance``.

    Raises:
        UsageError: If the teacher takes prompts, or the checkpoint or the folder is not what it
            should be.
        NonFiniteError: If a sample holds inf or nan.
    """
    options = options or CacheOptions(dtype='fp16', batch_size=1000, shard_size=10000)
    if num < 1:
        raise UsageError(f'--num-pairs must be at least 1, but is {num}')
    with DefaultScope.overwrite_default_scope('mmfgm'):
        # pairs are of the model's own space, so a decoder would be in the way
        model = building(
            lambda: SamplingModel(
                {**cfg.model, 'decoder': None},
                checkpoint,
                precision=precision,
                device=options.device,
            )
        )
        how = Sampling(network or model.available[0], **sampling)
        building(lambda: model.load(how.network))
    if model.num_classes is None:
        raise UsageError(
            f'{type(model.networks[how.network]).__name__} takes conditions that are no labels, and'
            ' couplings are drawn for labels alone; name a config of a network with num_classes'
        )
    model.sampler.check(how)
    items = GenerationDataset(num, model.num_classes or None, seed)
    shape = list(model.event_shape)
    job = dict(
        kind='couplings',
        identity=dict(teacher=dict(weights=fingerprint(model.networks[how.network]))),
        settings=dict(
            options.settings,
            **asdict(how),
            seed=seed,
            precision=precision,
            num_classes=model.num_classes,
        ),
        source=dict(count=num),
        layout=dict(x_0=shape, eps=shape),
        conditions={},
    )

    def draw(indices: list[int]) -> tuple[dict[str, Tensor], list]:
        batch = items.__getitems__(indices)
        x_0 = model.sample(batch, how).cpu()
        return _stored(dict(x_0=x_0, eps=model.sampler.noise(batch['seed'])), options), []

    write_shards(
        ShardWriter(out, job), num, options.shard_size, options.batch_size, draw, None, 'pair'
    )


def _stored(pair: dict[str, Tensor], options: CacheOptions) -> dict[str, Tensor]:
    """In the cache's dtype, which must be able to hold it."""
    stored = {name: value.to(options.torch_dtype) for name, value in pair.items()}
    for name, value in stored.items():
        if not is_finite(value):
            largest = float(torch.amax(pair[name].abs()))
            raise UsageError(
                f'{name} reaches {largest:.3g}, which --dtype {options.dtype} cannot hold; use'
                ' --dtype fp32'
            )
    return stored
