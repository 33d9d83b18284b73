# Copyright (c) mmfgm authors.
from torch import Tensor

from mmfgm.flow import PathSample, Weight, mean_over_event, weight_named

from .base import GeneratorLoss


def fgm_terms(u: Tensor, v: Tensor, path: PathSample) -> tuple[Tensor, Tensor]:
    """The two terms of the FGM loss (Eq. 4.10) for each sample, as means over its elements.

    The gradient is meant to flow into the generator through all three arguments: through ``x_t``
    inside ``u`` and ``v``, and through ``x_0`` inside ``path.velocity``. What is held constant is
    the parameters of ``v`` (``sg[theta]`` in Eq. 4.6 and 4.9), not its value. Note that
    ``l_1 + l_2 = ||u - c||^2 - ||v - c||^2`` with ``c = path.velocity``.

    Args:
        u (Tensor): Teacher velocity ``u(x_t, t)``, shape ``(N, *event)``.
        v (Tensor): Online velocity ``v_psi(x_t, t)``, shape ``(N, *event)``.
        path (PathSample): Where both were evaluated; its velocity is ``u_t(x_t | x_0) = eps -
            x_0``.

    Returns:
        tuple[Tensor, Tensor]: ``l_1`` (Eq. 4.11) and ``l_2`` (Eq. 4.12), each of shape ``(N,)``.
    """
    d = u - v
    l_1 = mean_over_event(d.square())  # (4.11) ||u - v||^2
    l_2 = 2 * mean_over_event(d * (v - path.velocity))  # (4.12) 2 (u - v)^T (v - u_t(x_t | x_0))
    return l_1, l_2


class FGMLoss(GeneratorLoss):
    """``w (l1_weight L_1 + L_2)``, the squared-difference family.

    The paper keeps ``L_1`` on 2-D toys (``l1_weight=1``) and drops it on images (``l1_weight=0``),
    where it destabilises training (Section 5.1, Appendix C.2). SiD (Zhou et al., 2024) is
    ``weight='sid'`` with ``l1_weight = 2 - 2 alpha``: alpha = 0.5, 1.0, 1.2 are ``l1_weight`` = 1,
    0, -0.4; SiD-DiT (Zhou et al., 2025) is ``weight='sid_dit'``.

    Args:
        l1_weight (float): Weight of ``L_1``. Defaults to 1, the loss whose gradient is exact.
        weight (str | dict | callable, optional): ``'sid'``, ``'sid_dit'``, or powers of t and 1 -
            t, see :func:`mmfgm.flow.weight_named`. Defaults to 1 for every sample.
    """

    name = 'fgm'

    def __init__(
        self, l1_weight: float = 1.0, weight: str | dict[str, float] | Weight | None = None
    ):
        super().__init__()
        self.l1_weight = l1_weight
        self.weight = None if weight is None else weight_named(weight)
        self.order_at_0 = getattr(self.weight, 'order_at_0', 0.0)

    def terms(self, u: Tensor, v: Tensor, path: PathSample) -> Tensor:
        """``w (l1_weight l_1 + l_2)``, shape ``(N,)``."""
        return self._weighted(*fgm_terms(u, v, path), u, path)

    def _weighted(self, l_1: Tensor, l_2: Tensor, u: Tensor, path: PathSample) -> Tensor:
        terms = self.l1_weight * l_1 + l_2 if self.l1_weight else l_2
        return terms if self.weight is None else self.weight(u, path) * terms

    def forward(self, u: Tensor, v: Tensor, path: PathSample) -> dict[str, Tensor]:
        """Returns ``loss_fgm`` and, for the log, both terms without their weights."""
        l_1, l_2 = fgm_terms(u, v, path)
        loss = self._weighted(l_1, l_2, u, path).mean()
        return dict(loss_fgm=loss, l_1=l_1.mean().detach(), l_2=l_2.mean().detach())
