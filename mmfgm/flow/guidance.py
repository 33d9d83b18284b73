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
        rescale (bool): Scale the guided velocity of each sample to the norm of its conditional one,
            so that guidance turns it and does not lengthen it. Defaults to False.
        low (float): With ``high``: guide only where ``low <= t <= high``, and take the conditional
            velocity elsewhere (Kynkaanniemi et al., 2024). Defaults to 0.
        high (float): Defaults to 1.

    Raises:
        ValueError: Unless ``0 <= low <= high <= 1``.
    """

    scale: float
    null: Callable[[Condition], Condition]
    rescale: bool = False
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                'guidance needs an interval 0 <= low <= high <= 1 (0 is data, 1 is noise), but got'
                f' low={self.low}, high={self.high}'
            )

    def __call__(
        self, network: Callable[..., Tensor], x_t: Tensor, t: Tensor, cond: Condition
    ) -> Tensor:
        if self.scale == 1:
            return network(x_t, t, **cond)
        null = self.null(cond)
        both = {name: torch.cat([null[name], cond[name]]) for name in cond}
        v_null, v_cond = network(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        v = v_null + self.scale * (v_cond - v_null)
        if self.rescale:
            dims = tuple(range(1, v.ndim))
            norms = [x.norm(dim=dims, keepdim=True) for x in (v_cond, v)]
            v = v * norms[0] / norms[1].clamp(min=torch.finfo(v.dtype).tiny)
        if (self.low, self.high) == (0.0, 1.0):
            return v
        inside = (self.low <= t) & (t <= self.high)
        return torch.where(inside.view(-1, *(1,) * (v.ndim - 1)), v, v_cond)
