# Copyright (c) mmfgm authors.
"""Losses that are given by the gradient ``G`` on ``x_0``, as the pseudo-loss ``sg(G)^T x_0``.

Neither network is differentiated, so both run without a graph. The value of such a loss means
nothing; ``l_1`` in the log says how far the flows are apart.
"""

from torch import Tensor

from mmfgm.flow import (
    SMALLEST_ERROR,
    PathSample,
    Weight,
    expand_t,
    mean_over_event,
    velocity_error,
    weight_named,
)

from .base import GeneratorLoss


class DiffInstructLoss(GeneratorLoss):
    """Diff-Instruct (Luo et al., 2023): the integral KL divergence of generator and teacher.

    Its gradient on ``x_0`` is ``w (1 - t) (s_v - s_u)``. The score of a flow is ``s_v = -(x_t + (1
    - t) v) / t``, so that it becomes ``w (1 - t)^2 / t (u - v)``.

    Args:
        weight (str | dict | callable, optional): ``w(t)``, see :func:`mmfgm.flow.weight_named`.
            Defaults to 1, which is not defined at t = 0: the density must then end above it.
    """

    name = 'di'
    through_networks = False

    def __init__(self, weight: str | dict[str, float] | Weight | None = None):
        super().__init__()
        self.weight = weight_named(weight)
        self.order_at_0 = getattr(self.weight, 'order_at_0', 0.0) - 1

    def terms(self, u: Tensor, v: Tensor, path: PathSample) -> Tensor:
        """``mean_d sg(G) x_0``, shape ``(N,)``."""
        u, v = u.detach(), v.detach()
        t = path.t.to(u.dtype)
        scale = self.weight(u, path) * (1 - t).square() / t
        return mean_over_event(expand_t(scale, u) * (u - v) * path.x_0)


class DMDLoss(GeneratorLoss):
    """The distribution-matching gradient of DMD and DMD2 (Yin et al., 2024).

    It is ``(D_v - D_u) / mean_d |x_0 - D_u|`` with denoisers ``D = x_t - t v``: in velocities,
    ``(u - v) / mean_d |u - (eps - x_0)|``.
    """

    name = 'dmd'
    through_networks = False

    def terms(self, u: Tensor, v: Tensor, path: PathSample) -> Tensor:
        """``mean_d sg(G) x_0``, shape ``(N,)``."""
        u, v = u.detach(), v.detach()
        error = velocity_error(u, path).clamp(min=SMALLEST_ERROR)
        return mean_over_event((u - v) / expand_t(error, u) * path.x_0)
