# Copyright (c) mmfgm authors.
from torch import Tensor, nn

from mmfgm.flow import PathSample, mean_over_event


class GeneratorLoss(nn.Module):
    """What the generator follows: one term a sample, a mean over the sample's elements.

    Subclasses implement :meth:`terms` and set what the model has to know about them.
    """

    # the log reads loss_NAME
    name = 'generator'
    # whether the gradient also flows through x_t into both networks; else they run without graph
    through_networks = True
    # the terms go like this power of t as t goes to 0; below 0 they are not defined there
    order_at_0 = 0.0

    def terms(self, u: Tensor, v: Tensor, path: PathSample) -> Tensor:
        """The loss of each sample.

        Args:
            u (Tensor): Teacher velocity ``u(x_t, t)``, shape ``(N, *event)``.
            v (Tensor): Online velocity ``v_psi(x_t, t)``, shape ``(N, *event)``.
            path (PathSample): Where both were evaluated.

        Returns:
            Tensor: Shape ``(N,)``, means over the event.
        """
        raise NotImplementedError(f'{type(self).__name__} does not define its terms')

    def forward(self, u: Tensor, v: Tensor, path: PathSample) -> dict[str, Tensor]:
        """The loss over the batch, and for the log ``l_1``: how far both flows are apart (4.11)."""
        l_1 = mean_over_event((u.detach() - v.detach()).square()).mean()
        return {f'loss_{self.name}': self.terms(u, v, path).mean(), 'l_1': l_1}
