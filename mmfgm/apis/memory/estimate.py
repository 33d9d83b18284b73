# Copyright (c) mmfgm authors.
"""Estimate the GPU memory that training a config takes, without weights, data or a GPU.

Parameters, gradients, optimizer state and averages are counted exactly, on the meta device.
Activations are what autograd keeps for the backward pass, counted in a forward pass on tensors
without values. Not counted are workspaces, temporary tensors and evaluation (its batch size and
decoder are its own); the reserve is for them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmfgm.apis.config import building
from mmfgm.engine import PRECISIONS, PerNetworkConstructor, default_strategy
from mmfgm.errors import UsageError
from mmfgm.models import FlowModel
from mmfgm.models.families import family_of
from mmfgm.registry import MODELS

from .activations import kept_bytes

GIB = 1 << 30
COLUMNS = ('parameters', 'gradients', 'optimizer', 'EMA', 'gathered/cast', 'activations')


@dataclass
class Plan:
    """What the config says about where tensors go."""

    strategy: str
    precision: str
    gpus: int
    block_types: Sequence[str] = ()

    @classmethod
    def of(cls, cfg: Config, gpus: int) -> 'Plan':
        """Read it from a config.

        Raises:
            UsageError: For a strategy or precision that is unknown or does not go with ``gpus``.
        """
        strategy = dict(cfg.get('strategy') or {})
        name = strategy.get(
            'type', default_strategy('none' if gpus == 1 else 'pytorch')
        ).removeprefix('mmfgm.')
        known = ('SingleDeviceStrategy', 'DDPStrategy', 'FSDP2Strategy')
        if name not in known or gpus < 1 or (name == known[0] and gpus > 1):
            raise UsageError(
                f'memory is known for the strategies {known} and the first for one GPU only, but'
                f' the config and --gpus say {name} on {gpus} GPU(s); choose one of them'
            )
        precision = strategy.get('precision', 'fp32')
        if precision not in PRECISIONS:
            raise UsageError(
                f'strategy.precision must be one of {PRECISIONS}, but is {precision!r}'
            )
        # the GPUs that memory is estimated for compute in bf16
        precision = 'bf16' if precision == 'auto' else precision
        family = family_of(cfg.model.network.get('type'))
        blocks = strategy.get('block_types') or (family.block_types if family else ())
        return cls(name, precision, gpus, tuple(blocks))

    @property
    def sharded(self) -> bool:
        return self.strategy == 'FSDP2Strategy'

    def local_bytes(self, tensor: Tensor) -> int:
        """Bytes of a parameter, or of a tensor like it, on the GPU that has most of it."""
        if not self.sharded or tensor.ndim == 0:
            return tensor.nbytes
        return math.ceil(len(tensor) / self.gpus) * math.prod(tensor.shape[1:]) * tensor.itemsize


@dataclass
class Memory:
    """Bytes per GPU by kind and network, and the numbers of parameters; ``phase`` is the one that
    keeps most."""

    batch_size: int
    numbers: dict[str, int] = field(default_factory=dict)
    networks: dict[str, dict[str, int]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    phase: str = ''

    @property
    def total(self) -> int:
        return sum(self.totals.values())


class _SameCondition:
    """Stands in for "no condition", which has the same shapes."""

    def __call__(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return cond


def build_on_meta(cfg: Config) -> FlowModel:
    """The config's model without values, on the meta device; nothing is read.

    Raises:
        UsageError: If one of its parts needs values.
    """
    model = cfg.model.to_dict()
    model['decoder'] = None  # runs in evaluations only
    if model.get('teacher'):
        model['teacher'] = dict(checkpoint=None)
    if model.get('guidance'):
        model['guidance']['null'] = dict(type=_SameCondition)
    if model.get('null_condition'):
        model['null_condition'] = dict(type=_SameCondition)
    if model.get('network', {}).get('pretrained'):
        model['network'] = without_weights(model['network'])

    def build():
        try:
            return MODELS.build(model)
        except RuntimeError as e:
            raise UsageError(
                f'the model cannot be built on the meta device, without values: {str(e)[:300]}'
            ) from e

    with torch.device('meta'):
        return building(build)


def without_weights(network: dict) -> dict:
    """A network config that names a diffusers pipeline, with the architecture read from it instead
    of the weights.

    Raises:
        UsageError: If the network is of another kind, or the pipeline has no config.
    """
    family = family_of(network['type'])
    if family is None:
        raise UsageError(
            f'the architecture of a pretrained {network["type"]} is not known without its weights;'
            ' give a config without pretrained='
        )
    return building(lambda: family.without_weights(network))


def optimizer_bytes(wrapper, plan: Plan) -> int:
    """Bytes of an optimizer's state after a step on meta tensors; step counts included."""
    params = [p for group in wrapper.optimizer.param_groups for p in group['params']]
    for p in params:
        p.grad = torch.empty_like(p)
    wrapper.optimizer.step()
    wrapper.optimizer.zero_grad()
    return sum(
        plan.local_bytes(value) if value.shape == p.shape else value.nbytes
        for p in params
        for value in wrapper.optimizer.state[p].values()
        if isinstance(value, Tensor)
    )


def gathered_bytes(networks: dict[str, nn.Module], trained: Sequence[str], plan: Plan) -> int:
    """Bytes that FSDP2 holds beside the shards: two blocks and the layers outside of blocks, and
    one block's gradients.

    Raises:
        UsageError: If no layer of the velocity network is a block.
    """
    if not any(
        type(m).__name__ in plan.block_types for m in next(iter(networks.values())).modules()
    ):
        raise UsageError(
            f'strategy.block_types={plan.block_types} matches no layer of the network; name the'
            ' class of its repeated blocks'
        )
    itemsize = 2 if plan.precision == 'bf16' else 4
    largest = 0
    for name, network in networks.items():
        blocks = [
            sum(p.numel() for p in m.parameters())
            for m in network.modules()
            if type(m).__name__ in plan.block_types
        ]
        rest = sum(p.numel() for p in network.parameters()) - sum(blocks)
        units = sorted([*blocks, 0, 0])[-2:]
        # a gradient is copied to float32 before it is reduced
        gradients = (itemsize + 4) * max(*units, rest) if name in trained else 0
        largest = max(largest, itemsize * (rest + sum(units)) + gradients)
    return largest


def count(model: FlowModel, cfg: Config, plan: Plan, batch_size: int) -> Memory:
    """Everything but activations and the weights that autocast copies."""
    memory = Memory(batch_size)
    trained = [name for phase in model.phases.values() for name in phase.trains]
    wrappers = cfg.optim_wrapper.to_dict()
    wrappers.pop('constructor', None)
    for name in wrappers:
        # fused kernels are for real devices; their state is the same
        wrappers[name].get('optimizer', {}).pop('fused', None)
    wrappers = building(lambda: PerNetworkConstructor(wrappers)(model))
    seen = set()
    for name, network in model.networks.items():
        # networks with adapters share a base, which counts where it comes first
        own = [p for p in network.parameters() if id(p) not in seen]
        buffers = [b for b in network.buffers() if id(b) not in seen]
        seen.update(map(id, [*own, *buffers]))
        memory.numbers[name] = sum(p.numel() for p in own)
        weights = sum(map(plan.local_bytes, own)) + sum(b.nbytes for b in buffers)
        row = memory.networks[name] = dict.fromkeys(COLUMNS, 0)
        row['EMA' if name in model.ema_decays else 'parameters'] = weights
        if name in trained:
            row['gradients'] = sum(
                plan.local_bytes(p) for p in network.parameters() if p.requires_grad
            )
            row['optimizer'] = optimizer_bytes(wrappers[name], plan)
    memory.totals = {
        column: sum(row[column] for row in memory.networks.values()) for column in COLUMNS
    }
    if plan.strategy != 'DDPStrategy':  # whose buckets stay
        memory.totals['gradients'] = max(
            sum(memory.networks[name]['gradients'] for name in phase.trains)
            for phase in model.phases.values()
        )
    if plan.sharded:
        memory.totals['gathered/cast'] = gathered_bytes(model.networks, trained, plan)
    return memory


def estimate(cfg: Config, gpus: int, batch_size: int | None = None) -> Memory:
    """Memory per GPU of training a config.

    Raises:
        UsageError: If the config cannot be built without values, or says nothing of what is needed.
    """
    missing = [key for key in ('model', 'optim_wrapper', 'train_dataloader') if not cfg.get(key)]
    if missing:
        raise UsageError(
            f'the config has no {", ".join(missing)}, so it does not say what training takes; name'
            ' the config of a training'
        )
    batch_size = cfg.train_dataloader.get('batch_size', 1) if batch_size is None else batch_size
    if batch_size < 1:
        raise UsageError(f'--batch-size must be at least 1, but is {batch_size}')
    init_default_scope('mmfgm')
    plan = Plan.of(cfg, gpus)
    model = build_on_meta(cfg)
    memory = count(model, cfg, plan, batch_size)
    kept = kept_bytes(
        model,
        batch_size,
        plan.precision == 'bf16',
        plan.sharded,
    )
    memory.phase = max(kept, key=lambda phase: sum(kept[phase]))
    memory.totals['activations'], casts = kept[memory.phase]
    memory.totals['gathered/cast'] += casts
    return memory


def table(memory: Memory) -> str:
    """What each network takes, and the sum, in GiB."""
    rows = [('GiB per GPU', 'numbers', *COLUMNS, 'sum')]
    for name, row in memory.networks.items():
        rows.append(
            (
                name,
                f'{memory.numbers[name] / 1e6:.1f} M',
                *(f'{row[c] / GIB:.3f}' if row[c] else '' for c in COLUMNS),
                f'{sum(row.values()) / GIB:.3f}',
            )
        )
    rows.append(
        (
            'total',
            f'{sum(memory.numbers.values()) / 1e6:.1f} M',
            *(f'{memory.totals[c] / GIB:.3f}' for c in COLUMNS),
            f'{memory.total / GIB:.3f}',
        )
    )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
