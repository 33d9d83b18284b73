# Copyright (c) mmfgm authors.
"""Fréchet distance between Gaussians fitted to features, in float64 (Heusel et al., 2017)."""

import torch
from mmengine.dist import all_reduce
from torch import Tensor


class StreamingMoments:
    """Running ``n``, ``sum x`` and ``sum x x^T`` of features, in float64 on the features' device.

    The sums are all that processes exchange, so features are never gathered.

    Args:
        dim (int): Dimension of the features.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.n = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features ``(N, dim)``.

        Raises:
            ValueError: If they have another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f'expected features (N, {self.dim}), but got {tuple(features.shape)}')
        x = features.detach().double()
        self._sum, self._outer = self._sum.to(x.device), self._outer.to(x.device)
        self.n += len(x)
        self._sum += x.sum(0)
        self._outer += x.T @ x

    def all_reduce(self) -> None:
        """Sum over processes; one that saw nothing takes part too."""
        n = torch.tensor(float(self.n), dtype=torch.float64)
        for value in (n, self._sum, self._outer):
            all_reduce(value)
        self.n = int(n)

    @property
    def mean(self) -> Tensor:
        """Mean ``(dim,)``, float64.

        Raises:
            ValueError: Without features.
        """
        self._need(1)
        return self._sum / self.n

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance ``(dim, dim)``, float64.

        Raises:
            ValueError: With fewer than 2 feature vectors.
        """
        self._need(2)
        return (self._outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)

    def _need(self, n: int) -> None:
        if self.n < n:
            raise ValueError(f'needs at least {n} feature vectors, but {self.n} were added')


def _roots(eigenvalues: Tensor) -> Tensor:
    """Roots of eigenvalues that are non-negative but for rounding.

    What is below rounding error counts as 0: the root of 1e-16 is 1e-8, so noise there would show
        in the
    distance and depend on the order of summation.
    """
    noise = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
    return torch.where(eigenvalues > noise, eigenvalues, 0).sqrt()


def frechet_distance(mu_1, cov_1, mu_2, cov_2) -> float:
    """``|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))``, in float64.

    The trace of the root is the sum of the roots of the eigenvalues of ``C_1^(1/2) C_2 C_1^(1/2)``,
    which is symmetric: no complex numbers, no matrix square root of a product.

    Args:
        mu_1 (Tensor | np.ndarray): Mean ``(d,)`` of the one.
        cov_1 (Tensor | np.ndarray): Its covariance ``(d, d)``.
        mu_2 (Tensor | np.ndarray): Mean ``(d,)`` of the other.
        cov_2 (Tensor | np.ndarray): Its covariance ``(d, d)``.

    Raises:
        ValueError: If the features differ in dimension or are not finite.
    """
    mu_1, cov_1, mu_2, cov_2 = (
        torch.as_tensor(x, dtype=torch.float64) for x in (mu_1, cov_1, mu_2, cov_2)
    )
    if (
        not mu_1.shape == mu_2.shape == cov_1.shape[1:] == cov_2.shape[1:]
        or not cov_1.shape == cov_2.shape
    ):
        raise ValueError(
            f'features of dimension {len(mu_1)} (covariance {tuple(cov_1.shape)}) cannot be'
            f' compared with features of dimension {len(mu_2)} (covariance {tuple(cov_2.shape)});'
            ' use statistics of the same feature function'
        )
    if not all(x.isfinite().all() for x in (mu_1, cov_1, mu_2, cov_2)):
        raise ValueError(
            'feature statistics are not finite; look at the samples before the distance'
        )
    mu_2 = mu_2.to(mu_1.device)
    cov_2 = cov_2.to(mu_1.device)
    values, vectors = torch.linalg.eigh(cov_1)
    root_1 = vectors * _roots(values) @ vectors.T
    trace_root = _roots(torch.linalg.eigvalsh(root_1 @ cov_2 @ root_1)).sum()
    return float((mu_1 - mu_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root)
