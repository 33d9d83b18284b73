# Copyright (c) mmfgm authors.
from torch import Tensor, nn

from mmfgm.flow import PathSample


def flow_matching_loss(v: Tensor, path: PathSample) -> Tensor:
    """``|| v - (eps - x_0) ||^2`` of each sample (Eq. 3.6).

    Args:
        v (Tensor): Predicted velocity ``v(x_t, t)``, shape ``(N, *event)``.
        path (PathSample): Where it was predicted; its velocity is ``eps - x_0``.

    Returns:
        Tensor: Summed over the event dimensions, shape ``(N,)``.
    """
    return (v - path.velocity).square().flatten(1).sum(1)


class FlowMatchingLoss(nn.Module):
    """Flow matching (Eq. 3.6): of a teacher on data, or of the online network on samples.

    It takes what every loss takes, ``(u, v, path)``; the teacher's velocity ``u`` plays no part in
    it and may be None.
    """

    def forward(self, u: Tensor | None, v: Tensor, path: PathSample) -> dict[str, Tensor]:
        """Returns ``loss_fm``, the mean over the batch."""
        return dict(loss_fm=flow_matching_loss(v, path).mean())
