# Copyright (c) mmfgm authors.
"""Fréchet distance between Gaussians fitted to features, in float64 (Heusel et al., 2017)."""
from dataclasses import dataclass

import torch
from mmengine.dist import all_reduce
from torch import Tensor


@dataclass(frozen=True)
class GaussianStats:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` in float64, of ``n`` feature vectors."""

    mu: Tensor
    sigma: Tensor
    n: int


class Moments:
    """Running ``n``, ``sum x`` and ``sum x x^T`` of features, in float64 on the CPU.

    The sums are all that processes exchange, so features are never gathered.
    """

    def __init__(self):
        self.n = 0
        self.sum = None
        self.outer = None

    def update(self, features: Tensor) -> None:
        """Add features ``(N, d)``."""
        x = features.detach().to('cpu', torch.float64)
        if self.sum is None:
            self.sum, self.outer = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def all_reduce(self, dim: int) -> None:
        """Sum over processes; ``dim`` lets one that saw nothing take part."""
        if self.sum is None:
            self.sum, self.outer = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        n = torch.tensor(float(self.n), dtype=torch.float64)
        for value in (n, self.sum, self.outer):
            all_reduce(value)
        self.n = int(n)

    def stats(self) -> GaussianStats:
        """The fitted Gaussian.

        Raises:
            ValueError: With fewer than 2 feature vectors.
        """
        if self.n < 2:
            raise ValueError(f'a covariance needs at least 2 feature vectors, but {self.n} were added')
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return GaussianStats(mu, sigma, self.n)


def _roots(eigenvalues: Tensor) -> Tensor:
    """Roots of eigenvalues that are non-negative but for rounding.

    What is below rounding error counts as 0: the root of 1e-16 is 1e-8, so noise there would show in the
    distance and depend on the order of summation.
    """
    noise = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
    return torch.where(eigenvalues > noise, eigenvalues, 0).sqrt()


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    The trace of the root is the sum of the roots of the eigenvalues of ``S_a^(1/2) S_b S_a^(1/2)``,
    which is symmetric: no complex numbers, no matrix square root of a product.

    Raises:
        ValueError: If the features differ in dimension or are not finite.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f'features of dimension {len(a.mu)} cannot be compared with features of dimension {len(b.mu)}; '
                         'use statistics of the same feature function')
    if not all(x.isfinite().all() for x in (a.mu, a.sigma, b.mu, b.sigma)):
        raise ValueError('feature statistics are not finite; look at the samples before the distance')
    values, vectors = torch.linalg.eigh(a.sigma)
    root_a = vectors * _roots(values) @ vectors.T
    trace_root = _roots(torch.linalg.eigvalsh(root_a @ b.sigma @ root_a)).sum()
    return float((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * trace_root)
