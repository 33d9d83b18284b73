# Copyright (c) mmfgm authors.
"""Low-rank adapters (Hu et al., 2022): several networks for the memory of one frozen base.

The base is one module, whoever calls it. A network of adapters owns nothing but them, and calls the
base with them switched on: hooks on the adapted layers add what the adapters of the call that runs
say. So the base can be sharded once, each set of adapters on its own, and the base alone is the
teacher.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# whose adapters are on; backward passes of a GPU run in a thread of their own, in which none are
_active: ContextVar['AdaptedNetwork | None'] = ContextVar('active adapters', default=None)


def _peft():
    """peft, or a UsageError that says how to install it."""
    try:
        import peft
    except ImportError as e:
        raise UsageError(f'LoRA needs peft ({e}); install it: pip install "mmfgm[sd3]"') from e
    return peft


class Adapter(nn.Module):
    """What is added to the output of one layer, ``alpha / rank B A x``; the names are peft's.

    Args:
        lora_A (nn.ModuleDict), lora_B (nn.ModuleDict): Each with one layer, ``default``.
        scaling (float): ``alpha / rank``.
    """

    def __init__(self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict, scaling: float):
        super().__init__()
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """Of the layer's input; in the type of the adapter, unless autocast has another."""
        a, b = self.lora_A['default'], self.lora_B['default']
        return b(a(x.to(a.weight.dtype))) * self.scaling

    def update(self) -> Tensor:
        """What is added to the weight of the layer, linear or a convolution."""
        a, b = self.lora_A['default'].weight, self.lora_B['default'].weight
        return torch.einsum('or,ri...->oi...', b.flatten(1), a) * self.scaling


@dataclass(frozen=True)
class _AddAdapter:
    """A forward hook of the base's layer ``name``."""

    name: str

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        network = _active.get()
        if network is None or self.name not in network.adapters:
            return output
        return (output + network.adapters[self.name](inputs[0])).to(output.dtype)


class AdaptedNetwork(nn.Module):
    """A frozen network with adapters of its own, which are all that it owns: its parameters and its
    state are theirs, by the names of peft.

    Moves and casts reach the base too.

    Args:
        base (nn.Module): Frozen, and shared with other networks.
        adapters (dict[str, Adapter]): By the names of the base's layers.

    Attributes:
        base (nn.Module): The shared one.
        adapters (dict[str, Adapter]): The same as given.
    """

    base: nn.Module

    def __init__(self, base: nn.Module, adapters: dict[str, Adapter]):
        super().__init__()
        # no child: what walks over the networks of a model must meet the base once
        self.__dict__['base'] = base
        self.adapters = adapters
        for name, adapter in adapters.items():
            *path, last = name.split('.')
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]
            place.add_module(last, adapter)
            hooks = base.get_submodule(name)._forward_hooks.values()
            if not any(isinstance(hook, _AddAdapter) for hook in hooks):
                base.get_submodule(name).register_forward_hook(_AddAdapter(name))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around calls of the base, or of its parts, that these adapters add to."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def forward(self, *args, **kwargs) -> Any:
        """The base's, with these adapters."""
        with self.active():
            return self.base(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self.base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def merged(self) -> nn.Module:
        """A copy of the base that computes what this network does; it shares what has no
        adapter."""
        layers = {name: self.base.get_submodule(name) for name in self.adapters}
        changed = {id(layer.weight) for layer in layers.values()}
        merged = copy.deepcopy(
            self.base, {id(p): p for p in self.base.parameters() if id(p) not in changed}
        )
        for name, adapter in self.adapters.items():
            layer: Any = merged.get_submodule(name)
            layer.weight += adapter.update().to(layer.weight.dtype)
            for key, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, _AddAdapter):
                    del layer._forward_hooks[key]
        return merged


def active_adapters() -> AdaptedNetwork | None:
    """Whose adapters are on."""
    return _active.get()


def has_adapters(network: nn.Module) -> bool:
    """Whether a network, or a part of it, was adapted by :class:`LoRA`."""
    return any(isinstance(module, AdaptedNetwork) for module in network.modules())


def without_adapters(network: nn.Module) -> nn.Module:
    """The base of an adapted network; another as it is."""
    return network.base if isinstance(network, AdaptedNetwork) else network


def copy_network(network: nn.Module) -> nn.Module:
    """A deep copy; of an adapted network only the adapters are copied, and the base is shared."""
    adapted = [module for module in network.modules() if isinstance(module, AdaptedNetwork)]
    return copy.deepcopy(network, {id(module.base): module.base for module in adapted})


@dataclass
class LoRA:
    """``W + alpha / rank B A`` in place of each chosen ``W``, which is frozen; ``B`` starts at 0,
    so nothing changes at first.

    Args:
        rank (int): Rows of ``A``.
        alpha (float): Scale of the update, times the rank.
        target_modules (Sequence[str]): Endings of the names of the layers to adapt, for example
            ``('attn.to_q',)``.

    Raises:
        UsageError: If the rank is not a positive whole number, or there are no target modules.
    """

    rank: int
    alpha: float
    target_modules: Sequence[str]

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UsageError(
                f'lora.rank must be a whole number of at least 1, but is {self.rank!r}'
            )
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise UsageError(
                "lora.target_modules must list endings of layers' names, for example ('attn.to_q',"
                f" 'attn.to_k'), but is {self.target_modules!r}"
            )

    def adapted(self, network: nn.Module) -> AdaptedNetwork:
        """A network that calls this one, which is frozen and evaluates, with adapters of its own in
        float32.

        Raises:
            UsageError: If an ending matches no layer that can be adapted.
        """
        names = [name for name, _ in network.named_modules()]
        for ending in self.target_modules:
            if not any(name == ending or name.endswith(f'.{ending}') for name in names):
                layers = sorted(
                    {
                        name.split('.')[-1]
                        for name, m in network.named_modules()
                        if isinstance(m, nn.Linear)
                    }
                )
                raise UsageError(
                    f'lora.target_modules: no layer of {type(network).__name__} is called'
                    f' {ending!r}; the last parts of the names of its linear layers are {layers}'
                )
        peft = _peft()
        settings = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=list(self.target_modules)
        )
        # peft puts its layers into a copy, whose weights are these
        weights = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
        injected = copy.deepcopy(network, weights)
        try:
            peft.inject_adapter_in_model(settings, injected)
        except ValueError as e:
            raise self._unsuitable(e) from e
        adapters = {}
        for name, layer in injected.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                adapters[name] = self._taken(layer, name)
        network.requires_grad_(False).eval()
        # which asks whose adapters are on
        from .recomputation import recomputed

        for module in network.modules():
            # diffusers' own function would compute blocks again without adapters
            if getattr(module, 'gradient_checkpointing', False):
                vars(module)['_gradient_checkpointing_func'] = recomputed
        return AdaptedNetwork(network, adapters)

    def _taken(self, layer: Any, name: str) -> Adapter:
        """What peft adds to a layer, out of the layer that it made."""
        base = layer.get_base_layer()
        if not isinstance(base, ADAPTABLE) or getattr(base, 'groups', 1) != 1:
            raise self._unsuitable(f'{name!r} is {base}')
        adapter = Adapter(layer.lora_A, layer.lora_B, layer.scaling['default'])
        for p in adapter.parameters():
            p.data = p.data.float()
        return adapter

    def _unsuitable(self, why: object) -> UsageError:
        return UsageError(
            f'lora.target_modules {tuple(self.target_modules)} name a layer that cannot be adapted:'
            f' {why}'
        )


@torch.no_grad()
def merge_adapters(network: nn.Module) -> nn.Module:
    """A copy in which each ``W`` of an adapted network is ``W + alpha / rank B A``, in plain layers
    of the base's names.

    Frozen tensors that no adapter touches stay shared with the base.
    """
    adapted = [module for module in network.modules() if isinstance(module, AdaptedNetwork)]
    memo = {id(module): module.merged() for module in adapted}
    return copy.deepcopy(network, memo).requires_grad_(False)
