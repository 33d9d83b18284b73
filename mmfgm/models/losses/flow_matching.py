# Copyright (c) mmfgm authors.
from torch import Tensor, nn

from mmfgm.flow import PathSample, mean_over_event


class FlowMatchingLoss(nn.Module):
    """Flow matching (Eq. 3.6): of a teacher on data, or of the online network on samples.

    It takes what every loss takes, ``(u, v, path)``; the teacher's velocity ``u`` plays no part in
    it and may be None.
    """

    def terms(self, u: Tensor | None, v: Tensor, path: PathSample) -> Tensor:
        """``|| v - (eps - x_0) ||^2`` of each sample (Eq. 3.6), a mean over its elements: ``(N,)``.

        Args:
            u: Not used.
            v (Tensor): Predicted velocity ``v(x_t, t)``, shape ``(N, *event)``.
            path (PathSample): Where it was predicted; its velocity is ``eps - x_0``.
        """
        return mean_over_event((v - path.velocity).square())

    def forward(self, u: Tensor | None, v: Tensor, path: PathSample) -> dict[str, Tensor]:
        """Returns ``loss_fm``, the mean over the batch."""
        return dict(loss_fm=self.terms(u, v, path).mean())
