# Copyright (c) mmfgm authors.
"""Classifier-free guidance, the only place it is written (Ho & Salimans, 2022)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Condition = dict[str, Tensor]


@dataclass(frozen=True)
class NullLabel:
    """The condition that means "no class": every label replaced by ``label``."""

    label: int

    def __call__(self, cond: Condition) -> Condition:
        return {**cond, 'labels': torch.full_like(cond['labels'], self.label)}


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """``v = v_null + scale (v_cond - v_null)``, both halves in one batched network call.

    Args:
        scale (float): 1 is the conditional velocity itself; the paper's SD3 teacher uses 4.
        null: Maps a batch of conditions to the unconditional ones, for example :class:`NullLabel`.
    """

    scale: float
    null: Callable[[Condition], Condition]

    def __call__(
        self, network: Callable[..., Tensor], x_t: Tensor, t: Tensor, cond: Condition
    ) -> Tensor:
        if self.scale == 1:
            return network(x_t, t, **cond)
        null = self.null(cond)
        both = {name: torch.cat([null[name], cond[name]]) for name in cond}
        v_null, v_cond = network(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        return v_null + self.scale * (v_cond - v_null)
