# Copyright (c) mmfgm authors.
from torch import Tensor, nn

from mmfgm.flow import PathSample


def fgm_terms(u: Tensor, v: Tensor, path: PathSample) -> tuple[Tensor, Tensor]:
    """The two terms of the FGM loss (Eq. 4.10) for each sample.

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
    l_1 = d.square().flatten(1).sum(1)  # (4.11) ||u - v||^2
    l_2 = 2 * (d * (v - path.velocity)).flatten(1).sum(1)  # (4.12) 2 (u - v)^T (v - u_t(x_t | x_0))
    return l_1, l_2


class FGMLoss(nn.Module):
    """``loss_scale (l1_weight L_1 + L_2)``, the generator's loss.

    The paper keeps ``L_1`` on 2-D toys (``l1_weight=1``) and drops it on images (``l1_weight=0``),
    where it destabilises training (Section 5.1, Appendix C.2). With SiD's alpha (Zhou et al.,
    2024), ``l1_weight = 2 - 2 alpha``: alpha = 0.5, 1.0, 1.2 are ``l1_weight`` = 1, 0, -0.4.

    Args:
        l1_weight (float): Weight of ``L_1``. Defaults to 1, the loss whose gradient is exact.
        loss_scale (float): Multiplies the sum; the paper uses 100 for SD3. Defaults to 1.
    """

    def __init__(self, l1_weight: float = 1.0, loss_scale: float = 1.0):
        super().__init__()
        self.l1_weight = l1_weight
        self.loss_scale = loss_scale

    def forward(self, u: Tensor, v: Tensor, path: PathSample) -> dict[str, Tensor]:
        """Returns ``loss_fgm`` and, for the log, ``l_1`` and ``l_2``; scalars over the batch."""
        l_1, l_2 = (term.mean() for term in fgm_terms(u, v, path))
        loss = self.l1_weight * l_1 + l_2 if self.l1_weight else l_2
        return dict(loss_fgm=self.loss_scale * loss, l_1=l_1.detach(), l_2=l_2.detach())
