# Copyright (c) mmfgm authors.
"""How much autograd keeps for the backward pass, found out on tensors without values that pass for
a GPU's."""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmfgm.errors import UsageError
from mmfgm.models import FlowModel


def dummy_batch(network: Any, batch_size: int) -> dict[str, Any]:
    """A training batch of zeros; conditions of further shapes come from
    ``network.dummy_conditions(batch_size)``.

    Raises:
        UsageError: If the network does not say which conditions it takes.
    """
    if hasattr(network, 'dummy_conditions'):
        cond = network.dummy_conditions(batch_size)
    elif getattr(network, 'num_classes', None) is not None:
        cond = (
            dict(labels=torch.zeros(batch_size, dtype=torch.int64)) if network.num_classes else {}
        )
    else:
        raise UsageError(
            f'{type(network).__name__} does not say which conditions it takes; give it num_classes'
            ' (0: none) or dummy_conditions(batch_size) -> dict of tensors'
        )
    x_0 = torch.zeros(batch_size, *network.event_shape)
    idx = torch.arange(batch_size)
    return dict(idx=idx, x_0=x_0, cond=cond, real=dict(x_0=x_0, cond=cond))


class _FusedAttention(torch.autograd.Function):
    """What fused attention keeps."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _AttentionOfGPU(TorchFunctionMode):
    """Chooses attention as torch does on a GPU; without one it would always keep the matrix of
    weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        qkv = [*args[:3], *(kwargs[name] for name in ('query', 'key', 'value')[len(args) :])]
        # fused kernels want channels side by side
        if any(x.stride(-1) != 1 for x in qkv):
            return func(*args, **kwargs)
        if torch.is_autocast_enabled('cuda'):
            qkv = [x.to(torch.bfloat16) for x in qkv]
        return _FusedAttention.apply(*qkv)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Kept(TorchDispatchMode):
    """Collects what autograd keeps while this is active, each storage once and without the weights
    themselves."""

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.weights = {_storage(weight) for weight in weights}
        # tensors are held, so that their storage's number is not given to another
        self.copies: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _storage(args[0]) in self.weights:
            self.copies[_storage(out)] = out
        return out

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.weights:
            self.kept[_storage(tensor)] = tensor
        return tensor

    def bytes(self) -> tuple[int, int]:
        """Of activations, and of copies of weights in another precision."""
        sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in self.kept.items()}
        casts = sum(size for key, size in sizes.items() if key in self.copies)
        return sum(sizes.values()) - casts, casts

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.hooks.__exit__(*args)


@contextmanager
def _autocast():
    """bf16 autocast of CUDA tensors, which ``torch.autocast`` refuses where there is no GPU."""
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    torch.set_autocast_enabled('cuda', True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled('cuda', False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def _to_fake_gpu(model: FlowModel, bf16: bool, sharded: bool) -> None:
    """Replace tensors on the meta device by such that pass for a GPU's, and set the precision of
    strategies."""
    replaced = {}  # by id: networks with adapters share a base
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) in replaced:
                    tensors[name] = replaced[id(old)][1]
                    continue
                weight = isinstance(old, nn.Parameter)
                dtype = torch.bfloat16 if weight and bf16 and sharded else old.dtype
                new = torch.empty_strided(old.shape, old.stride(), dtype=dtype, device='cuda')
                tensors[name] = nn.Parameter(new, old.requires_grad) if weight else new
                replaced[id(old)] = old, tensors[name]
        # tables that are neither, such as those of rotary embeddings
        for name, old in list(vars(module).items()):
            if isinstance(old, Tensor):
                setattr(module, name, torch.empty(old.shape, dtype=old.dtype, device='cuda'))
    model.data_preprocessor.to('cuda')
    # labels without values cannot be looked at
    model.num_classes = None

    if bf16 and not sharded:
        model.autocast = _autocast


@contextmanager
def _recomputed(model: FlowModel, weights: Sequence[Tensor]):
    """Yields a list that grows by the bytes each block keeps while diffusers' checkpointing
    computes it again."""
    sizes = [0]

    def checkpoint(block, *args, original, **kwargs):
        with _Kept(weights) as kept:
            block(*args, **kwargs)
        sizes.append(sum(kept.bytes()))
        return original(block, *args, **kwargs)

    modules = [m for m in model.modules() if getattr(m, 'gradient_checkpointing', False)]
    originals = [m._gradient_checkpointing_func for m in modules]
    try:
        for m, original in zip(modules, originals):
            m._gradient_checkpointing_func = partial(checkpoint, original=original)
        yield sizes
    finally:
        for m, original in zip(modules, originals):
            m._gradient_checkpointing_func = original


def kept_bytes(
    model: FlowModel, batch_size: int, bf16: bool, sharded: bool
) -> dict[str, tuple[int, int]]:
    """Phase to bytes of activations and of bf16 copies of weights that its backward pass needs at
    once.

    Args:
        model (FlowModel): On the meta device; its tensors are replaced, so it is of no use
            afterwards.
        batch_size (int): Of one process.
        bf16 (bool): Compute in bf16: with autocast, or with bf16 weights if ``sharded``.
        sharded (bool): Whether the strategy is FSDP2, whose gathered weights are not counted.

    Raises:
        UsageError: If the network does not say which conditions it takes, or needs values to be
            run.
    """
    with FakeTensorMode(), _AttentionOfGPU():
        _to_fake_gpu(model, bf16, sharded)
        batch = dummy_batch(next(iter(model.networks.values())), batch_size)
        model.train()
        weights = [*model.parameters(), *model.buffers()]
        found = {}
        for phase, spec in model.phases.items():
            frozen = [
                p
                for name in spec.freezes
                for p in getattr(model, name).parameters()
                if p.requires_grad
            ]
            for p in frozen:
                p.requires_grad_(False)
            try:
                with (
                    _recomputed(model, weights) as again,
                    _Kept(weights) as kept,
                    model.autocast(),
                ):
                    # held, as the training loop does
                    losses = model.loss(phase, model.prepare(batch, spec.differentiable))
            except (RuntimeError, TypeError, ValueError) as e:
                raise UsageError(
                    f'phase {phase!r} cannot be run on tensors without values: {str(e)[:300]}'
                ) from e
            for p in frozen:
                p.requires_grad_(True)
            activations, casts = kept.bytes()
            found[phase] = activations + max(again), casts
            del losses
    return found
