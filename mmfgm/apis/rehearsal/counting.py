# Copyright (c) mmfgm authors.
"""What an iteration costs, counted while it runs, on tensors with or without values."""

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from .gpus import GPU, RING_HOP, RING_HOP_BETWEEN, RING_START
from .pretending import Replicated

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(q, k, v, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """torch has no formula for the attention that a CPU runs, and would count 0."""
    return sdpa_flop_count(q, k, v)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(grad, q, k, v, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tree: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(tree))


class _Local(TorchDispatchMode):
    """Sees each operation on this process's tensors, after DTensors were taken apart; not those by
    which DTensor works out shapes, in a fake mode of its own."""

    def __enter__(self):
        self._fake_mode = active_fake_mode()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if active_fake_mode() is self._fake_mode:
            self.see(func, args, kwargs or {}, out)
        return out

    def see(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        raise NotImplementedError


class Message(NamedTuple):
    """A collective among ``members`` processes on ``machines``, of ``size`` bytes: the whole
    tensor, which is what an all-gather returns, what a reduce-scatter is given, what an all-reduce
    sums."""

    name: str
    members: int
    machines: int
    size: int

    def seconds(self, gpu: GPU) -> float:
        """Around a ring, as NCCL reckons it.

        ``(n - 1) / n`` of the message pass each process in one direction, twice that for an
        all-reduce. Between machines it is spread over the network cards of all members of one.
        """
        rounds = 2 if self.name == 'all_reduce' else 1
        speed = gpu.link_bytes_per_second
        if self.machines > 1:
            cards = self.members / self.machines
            speed = min(speed, cards * gpu.network_bytes_per_second)
        hops, between = rounds * (self.members - 1), rounds * (self.machines - 1)
        return (
            hops / self.members * self.size / speed
            + RING_START
            + (hops - between) * RING_HOP
            + between * RING_HOP_BETWEEN
        )


class Traffic(_Local):
    """The collectives that one process takes part in.

    Args:
        per_machine (int): Processes of a machine, which have successive ranks. Defaults to 8.

    Attributes:
        messages (Counter[Message]): How often each was sent.
    """

    NAMES = (
        ('reduce_scatter', ('reduce_scatter',)),
        ('all_gather', ('allgather', 'all_gather')),
        ('all_reduce', ('allreduce', 'all_reduce')),
        ('broadcast', ('broadcast',)),
    )

    def __init__(self, per_machine: int = 8) -> None:
        super().__init__()
        self.per_machine = per_machine
        self.messages: Counter[Message] = Counter()

    def see(self, func, args, kwargs, out) -> None:
        if func not in collective_ops or func in sync_ops:
            return
        op = func._opname
        name = next(
            (name for name, parts in self.NAMES if any(part in op for part in parts)), op.strip('_')
        )
        ranks = dist.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
        machines = len({rank // self.per_machine for rank in ranks})
        self.messages[Message(name, len(ranks), machines, max(map(_nbytes, (*args, out))))] += 1

    @property
    def bytes(self) -> Counter[str]:
        """By collective, ``'all_gather'`` for example."""
        return sizes_of(self.messages)


def sizes_of(messages: Counter[Message]) -> Counter[str]:
    """Bytes of each collective."""
    found: Counter[str] = Counter()
    for message, times in messages.items():
        found[message.name] += times * message.size
    return found


class Work(_Local):
    """Arithmetic, and the time that a GPU takes at least: of each operation, the longer of its
    arithmetic and of reading and writing its tensors (a roofline without fusion).

    Attributes:
        flops (int): Of matrix products, convolutions and attention; two for a multiplication and an
            addition.
        seconds (float): 0 without a GPU.
    """

    def __init__(self, gpu: GPU | None = None, tf32: bool = False) -> None:
        super().__init__()
        self.gpu = gpu
        self.tf32 = tf32
        self.flops = 0
        self.seconds = 0.0

    def see(self, func, args, kwargs, out) -> None:
        if func in collective_ops:
            return
        # fake tensors let this pass
        types = {x.dtype for x in _tensors(args)} if func._overloadpacket in PRODUCTS else ()
        if len(types) > 1:
            raise RuntimeError(f'a matrix product mixes dtypes: {sorted(map(str, types))}')
        flops = 0
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=out)
        self.flops += flops
        # a view moves nothing
        if (
            self.gpu is None
            or func.is_view
            or func in (aten.empty.memory_format, aten.detach.default)
        ):
            return
        compute = 0.0
        if flops:
            compute = flops / self.gpu.flops_per_second(_tensors(args)[0].dtype, self.tf32)
        moved = (_nbytes(args) + _nbytes(kwargs) + _nbytes(out)) / self.gpu.bytes_per_second
        self.seconds += max(compute, moved)


class Kind(str, Enum):
    """What memory is for."""

    PARAMETERS = 'parameters'
    AVERAGES = 'averages'
    GRADIENTS = 'gradients'
    OPTIMIZER = 'optimizer'
    GATHERED = 'gathered/cast'
    ACTIVATIONS = 'activations'


class Memory(MemTracker):
    """Peak of memory by kind.

    torch's tracker sees tensors come, go and change their size. What they were for is known only
    later (a gradient becomes one when the backward pass is over), so the events are kept, and a
    peak is put together when it is asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ref_class: Any = Kind
        self._events: list[tuple[Any, int]] = []

    # of torch's tracker, what needs modules to be called once in an iteration is left out
    def __enter__(self):
        self._fake_mode_on_entry = active_fake_mode()
        self._track_resize()
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *args: Any) -> None:
        self._restore_resize()
        TorchDispatchMode.__exit__(self, *args)

    def _update_peak_stats(self, peak_state: Any) -> None:
        pass

    def _update_snap(self, u_type, winfo, old_mem_consumed=None, old_reftype=None) -> None:
        kind = u_type.name
        if kind == 'ADD':
            self._events.append((winfo, winfo.mem_consumed))
        elif kind == 'DEL':
            self._events.append((winfo, -winfo.mem_consumed))
        elif kind == 'SIZE':
            self._events.append((winfo, winfo.mem_consumed - old_mem_consumed))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # which it is, outside of a fake mode
        out = func(*args, **(kwargs or {}))
        if active_fake_mode() is not self._fake_mode_on_entry:
            return out
        if func in collective_ops:
            self._mark(Kind.GATHERED, (args, out))
        elif func is aten._to_copy.default and self._kind(args[0]) in (
            Kind.PARAMETERS,
            Kind.AVERAGES,
        ):
            self._mark(Kind.GATHERED, out)
        else:
            for tensor in _tensors(out):
                if self._kind(tensor) is None:
                    self._mark(Kind.ACTIVATIONS, tensor)
        return out

    def _kind(self, tensor: Tensor) -> Kind | None:
        winfo, _ = self._WINFO.get(tensor.untyped_storage(), (None, None))
        return None if winfo is None else winfo.reftype

    def _mark(self, kind: Kind, tree: Any) -> None:
        for tensor in _tensors(tree):
            self._update_and_maybe_create_winfos(tensor, kind)

    def know(
        self, networks: dict[str, nn.Module], averages: Iterable[str], optimizers: Any
    ) -> None:
        """Say what each tensor is that lasts; call it before an iteration, and whenever gradients
        are whole."""
        # weights that an average shares with a network, under adapters, are the network's
        for name, network in sorted(networks.items(), key=lambda item: item[0] not in averages):
            kind = Kind.AVERAGES if name in averages else Kind.PARAMETERS
            self._mark(kind, [*network.parameters(), *network.buffers()])
            self._mark(Kind.GRADIENTS, [p.grad for p in network.parameters()])
            for module in network.modules():
                if isinstance(module, Replicated):
                    self._mark(Kind.GRADIENTS, list(module.buckets.values()))
                group = (
                    isinstance(module, FSDPModule) and module._get_fsdp_state()._fsdp_param_group
                )
                for param in group.fsdp_params if group else ():
                    self._mark(kind, param._sharded_param_data)
                    self._mark(
                        Kind.GATHERED,
                        [param.all_gather_outputs, getattr(param, '_unsharded_param', None)],
                    )
        for optimizer in optimizers:
            self._track_optimizer_states(Kind.OPTIMIZER, optimizer)

    def mark(self) -> int:
        """A point in time."""
        return len(self._events)

    def peak(self, start: int, end: int) -> dict[str, int]:
        """Bytes by kind at the moment between two points in time when their sum is highest."""
        total, highest, moment = 0, -1, start
        for i, (_, change) in enumerate(self._events[:end]):
            total += change
            if i >= start and total > highest:
                highest, moment = total, i
        found = dict.fromkeys((kind.value for kind in Kind), 0)
        for winfo, change in self._events[: moment + 1]:
            found[winfo.reftype.value] += change
        return found
