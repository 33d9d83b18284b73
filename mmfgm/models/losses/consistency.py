# Copyright (c) mmfgm authors.
"""Velocity consistency: Consistency Flow Matching (Yang et al., 2024, arXiv 2407.02398).

The authors' time s runs from noise to data: here ``t = 1 - s``, and every velocity has the other
sign.
"""

import torch
from torch import Tensor, nn

from mmfgm.flow import LinearPath, PathSample, expand_t, mean_over_event


class VelocityConsistencyLoss(nn.Module):
    """Where a straight line from ``x_t`` arrives must not depend on ``t``, nor its direction.

    [0, 1] is cut into equal segments. With ``e`` the end of t's segment that is nearer to the data,
    and ``r = t - delta``, the loss of a sample is ``|f(x_t, t) - f^-(x_r, r)|^2 + alpha |v(x_t, t)
    - v^-(x_r, r)|^2`` with ``f(x_t, t) = x_t - (t - e) v(x_t, t)``. The second term counts where t
    and r lie in one segment. ``x_r`` is on the straight line through ``x_0`` and ``eps`` too.

    Args:
        segments (int): Defaults to 2; a model is then sampled in two Euler steps.
        delta (float): How far apart t and r are. Defaults to 1e-3, the authors'.
        boundary (float): From this r on towards the data, ``f^-`` is the point of the line at e
            itself, which is known there; 1 is flow matching, weighted by ``(t - e)^2``. It is 1
            minus the authors' ``boundary``. Defaults to 0.1.
        alpha (float): Defaults to 1e-5, the authors'.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        segments: int = 2,
        delta: float = 1e-3,
        boundary: float = 0.1,
        alpha: float = 1e-5,
    ):
        super().__init__()
        if not (segments >= 1 and 0 < delta < 1 and 0 <= boundary <= 1 and alpha >= 0):
            raise ValueError(
                'VelocityConsistencyLoss needs segments >= 1, 0 < delta < 1, 0 <= boundary <= 1 and'
                f' alpha >= 0, but got segments={segments}, delta={delta}, boundary={boundary},'
                f' alpha={alpha}'
            )
        self.segments, self.delta = segments, delta
        self.boundary, self.alpha = boundary, alpha

    def earlier(self, t: Tensor) -> Tensor:
        """``r = t - delta``, which does not lead below 0; shape ``(N,)``."""
        return (t - self.delta).clamp(min=0)

    def segment_end(self, t: Tensor) -> Tensor:
        """``e``: the largest multiple of ``1 / segments`` up to t, and below 1; shape ``(N,)``."""
        return torch.floor(t * self.segments).clamp(max=self.segments - 1) / self.segments

    def terms(self, u: Tensor | None, v: Tensor, path: PathSample) -> Tensor:
        """The loss of each sample, a mean over its elements: ``(N,)``.

        Args:
            u (Tensor, optional): ``v^-(x_r, r)``, the velocity to be consistent with, shape ``(N,
                *event)``; no gradient reaches it. None is ``boundary=1``, which needs none.
            v (Tensor): ``v(x_t, t)``, shape ``(N, *event)``.
            path (PathSample): Where ``v`` was evaluated.
        """
        t, r, e = path.t, self.earlier(path.t), self.segment_end(path.t)
        arrives = path.x_t - expand_t(t - e, v) * v  # f(x_t, t)
        target = LinearPath.interpolate(path.x_0, path.eps, e)
        if u is None:
            return mean_over_event((arrives - target).square())
        u = u.detach()
        x_r = LinearPath.interpolate(path.x_0, path.eps, r)
        open_ = r > self.boundary
        there = x_r - expand_t(r - e, u) * u  # f^-(x_r, r)
        target = torch.where(expand_t(open_, v).bool(), there, target)
        first = mean_over_event((arrives - target).square())
        # a hundredth more than delta, so that rounding does not put r into the next segment
        same = (t - e > 1.01 * self.delta) & (t > self.boundary)
        second = mean_over_event((v - u).square())
        return first + self.alpha * same * second

    def forward(self, u: Tensor | None, v: Tensor, path: PathSample) -> dict[str, Tensor]:
        """Returns ``loss_consistency``, the mean over the batch."""
        return dict(loss_consistency=self.terms(u, v, path).mean())
