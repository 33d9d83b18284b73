# Copyright (c) mmfgm authors.
"""Classifier-free guidance, the only place it is written (Ho & Salimans, 2022)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

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
        rescale (bool | Sequence[int]): Scale the guided velocity of each sample to the norm of its
            conditional one, so that guidance turns it and does not lengthen it; or do so over these
            dimensions only, such as ``(-1,)``, each row of an image for itself. Defaults to False.
        patch (int, optional): Take these norms of each ``patch x patch`` of latents ``(N, C, H,
            W)``, all channels together, as Qwen-Image's pipeline does. Defaults to whole samples.
        low (float): With ``high``: guide only where ``low <= t <= high``, and take the conditional
            velocity elsewhere (Kynkaanniemi et al., 2024). Defaults to 0.
        high (float): Defaults to 1.
        channels (int, optional): Guide the first so many channels and take the conditional velocity
            of the others, as DiT and SiT are sampled, with 3 of 4. Defaults to all.

    Raises:
        ValueError: Unless ``0 <= low <= high <= 1``, or if no channel would be guided.
    """

    scale: float
    null: Callable[[Condition], Condition]
    rescale: bool | Sequence[int] = False
    low: float = 0.0
    high: float = 1.0
    channels: int | None = None
    patch: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                'guidance needs an interval 0 <= low <= high <= 1 (0 is data, 1 is noise), but got'
                f' low={self.low}, high={self.high}'
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(
                f'guidance needs at least 1 channel, but got channels={self.channels}; use None for'
                ' all channels, or scale=1 for no guidance'
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
        if self.channels is not None:
            v = torch.cat([v[:, : self.channels], v_cond[:, self.channels :]], dim=1)
        if self.rescale:
            norm_cond, norm = self._norm(v_cond), self._norm(v)
            v = v * norm_cond / norm.clamp(min=torch.finfo(v.dtype).tiny)
        if (self.low, self.high) == (0.0, 1.0):
            return v
        inside = (self.low <= t) & (t <= self.high)
        return torch.where(inside.view(-1, *(1,) * (v.ndim - 1)), v, v_cond)

    def _norm(self, v: Tensor) -> Tensor:
        """Of each sample, over the dimensions asked for or in each patch; broadcasts."""
        if self.patch is None:
            dims = range(1, v.ndim) if isinstance(self.rescale, bool) else self.rescale
            norms: Tensor = vector_norm(v, dim=tuple(dims), keepdim=True)
            return norms
        n, c, h, w = v.shape
        p = self.patch
        norms = vector_norm(v.reshape(n, c, h // p, p, w // p, p), dim=(1, 3, 5))
        norms = norms.repeat_interleave(p, 1).repeat_interleave(p, 2)
        return norms.unsqueeze(1)
