# Copyright (c) mmfgm authors.
"""RealUID (ICLR 2026): FGM that can see real data; ``alpha = beta = 1`` is FGM, ``L_1 + L_2``."""

from torch import Tensor, nn

from mmfgm.flow import PathSample, mean_over_event

from .base import GeneratorLoss


class RealUIDLoss(GeneratorLoss):
    """``alpha |u - (beta / alpha) c|^2 - alpha |v - (beta / alpha) c|^2`` with ``c = eps - x_0``.

    Args:
        alpha (float): Share of the generated samples in what the online network learns from, in
            (0, 1].
        beta (float): Share of their targets; the authors' best ratios ``beta / alpha`` are 0.98
            and 1.02.

    Raises:
        ValueError: Unless ``0 < alpha <= 1`` and ``beta > 0``.
    """

    name = 'realuid'

    def __init__(self, alpha: float = 1.0, beta: float = 1.0):
        super().__init__()
        _check_shares(alpha, beta)
        self.alpha, self.beta = alpha, beta

    def terms(self, u: Tensor, v: Tensor, path: PathSample) -> Tensor:
        """Means over elements, shape ``(N,)``."""
        # the difference of two squares, written as a product: both are large where it is small
        both = u + v - 2 * (self.beta / self.alpha) * path.velocity
        return self.alpha * mean_over_event((u - v) * both)


class RealUIDOnlineLoss(nn.Module):
    """``alpha |v(x_t) - (beta / alpha) c|^2 + (1 - alpha) |v(x_t^real) - ((1 - beta) / (1 -
    alpha)) c^real|^2``.

    Args:
        alpha (float): As in :class:`RealUIDLoss`. With 1 no real data are needed, and beta must be
            1 too: the second target would be infinite.
        beta (float): As in :class:`RealUIDLoss`.

    Raises:
        ValueError: For shares outside their ranges, or ``alpha=1`` with another ``beta``.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0):
        super().__init__()
        _check_shares(alpha, beta)
        if alpha == 1 and beta != 1:
            raise ValueError(
                f'alpha=1 leaves no share to real data, so beta must be 1 too, but is {beta}; use '
                'alpha below 1, for example 0.94'
            )
        self.alpha, self.beta = alpha, beta

    @property
    def needs_real(self) -> bool:
        """Whether the model must give this loss velocities of real data too."""
        return self.alpha < 1

    def terms(
        self,
        u: Tensor | None,
        v: Tensor,
        path: PathSample,
        v_real: Tensor | None = None,
        path_real: PathSample | None = None,
    ) -> Tensor:
        """Both terms of each pair of a generated and a real sample, means over elements: ``(N,)``.

        Args:
            u: Not used.
            v (Tensor): Online velocity on generated samples, shape ``(N, *event)``.
            path (PathSample): Where it was evaluated.
            v_real (Tensor, optional): Online velocity on noisy real data, shape ``(N, *event)``.
            path_real (PathSample, optional): Where that was evaluated.

        Raises:
            ValueError: Without real data, if they have a share.
        """
        generated = mean_over_event((v - (self.beta / self.alpha) * path.velocity).square())
        if not self.needs_real:
            return generated
        if v_real is None or path_real is None:
            raise ValueError(
                f'alpha={self.alpha} gives real data a share, but none were given; pass v_real and '
                'path_real, or use alpha=beta=1'
            )
        ratio = (1 - self.beta) / (1 - self.alpha)
        real = mean_over_event((v_real - ratio * path_real.velocity).square())
        return self.alpha * generated + (1 - self.alpha) * real

    def forward(
        self,
        u: Tensor | None,
        v: Tensor,
        path: PathSample,
        v_real: Tensor | None = None,
        path_real: PathSample | None = None,
    ) -> dict[str, Tensor]:
        """Returns ``loss_fm``, the mean over the batch."""
        return dict(loss_fm=self.terms(u, v, path, v_real, path_real).mean())


def _check_shares(alpha: float, beta: float) -> None:
    """Raises ValueError unless ``0 < alpha <= 1`` and ``beta > 0``."""
    if not (0 < alpha <= 1 and beta > 0):
        raise ValueError(
            f'RealUID needs 0 < alpha <= 1 and beta > 0, but got alpha={alpha}, beta={beta}; its '
            'authors use alpha from 0.9 to 1 and beta / alpha of 0.98 or 1.02'
        )
