# Copyright (c) mmfgm authors.
"""Low-rank adapters (Hu et al., 2022): several networks for the memory of one frozen base."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError


def _peft():
    """peft, or a UsageError that says how to install it."""
    try:
        import peft
    except ImportError as e:
        raise UsageError(f'LoRA needs peft ({e}); install it: pip install "mmfgm[sd3]"') from e
    return peft


def has_adapters(network: nn.Module) -> bool:
    """Whether a network, or a part of it, was adapted by :class:`LoRA`."""
    return any(getattr(module, 'peft_config', None) for module in network.modules())


def _copy_sharing(network: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """A deep copy in which the ``shared`` tensors, and buffers, are those of the original."""
    return copy.deepcopy(
        network, {id(tensor): tensor for tensor in chain(shared, network.buffers())}
    )


def copy_network(network: nn.Module) -> nn.Module:
    """A deep copy; of an adapted network only the adapters are copied, and the base is shared."""
    if not has_adapters(network):
        return copy.deepcopy(network)
    return _copy_sharing(network, (p for p in network.parameters() if not p.requires_grad))


def move_to(module: nn.Module, target: str | torch.device | torch.dtype) -> None:
    """``module.to(target)``, which keeps shared parameters shared, but makes a new tensor for each
    use of a shared buffer."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            uses.setdefault(id(buffer), []).append((part, name))
    module.to(target)
    for (first, name), *others in uses.values():
        for part, other in others:
            part._buffers[other] = first._buffers[name]


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

    def adapted(self, network: nn.Module) -> nn.Module:
        """A copy that shares the weights of a network, which are frozen, and trains adapters of its
        own in float32.

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
        adapted = _copy_sharing(network, network.parameters())
        try:
            peft.inject_adapter_in_model(settings, adapted)
        except ValueError as e:
            raise UsageError(
                f'lora.target_modules {tuple(self.target_modules)} name a layer that cannot be'
                f' adapted: {e}'
            ) from e
        for p in adapted.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        return adapted


@torch.no_grad()
def merge_adapters(network: nn.Module) -> nn.Module:
    """A copy of an adapted network in which each ``W`` is ``W + alpha / rank B A``, in plain layers
    of their old names.

    Frozen tensors that no adapter touches stay shared with the original.
    """
    layer_type = _peft().tuners.tuners_utils.BaseTunerLayer
    layers = {
        name: module for name, module in network.named_modules() if isinstance(module, layer_type)
    }
    memo = {id(p): p for p in network.parameters() if not p.requires_grad}
    for layer in layers.values():
        # what is merged into must be a copy
        memo.pop(id(layer.get_base_layer().weight), None)
    merged = copy.deepcopy(network, memo)
    for name in layers:
        layer = merged.get_submodule(name)
        layer.merge(safe_merge=True)
        parent, _, attribute = name.rpartition('.')
        setattr(merged.get_submodule(parent), attribute, layer.get_base_layer())
    for module in merged.modules():
        if getattr(module, 'peft_config', None):
            del module.peft_config
    return merged.requires_grad_(False)
