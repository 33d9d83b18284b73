# Copyright (c) mmfgm authors.
"""A problem in which everything the paper calls intractable has a closed form.

The generator is ``g(z) = a z + b``, so ``p_{theta,0} = N(b, a^2)`` and its implicit velocity
``v_{theta,t}(x) = E[eps - x_0 | x_t = x]`` is affine in ``x``.
"""

import numpy as np
import torch
from torch import nn


def implicit_velocity(x, t, a, b):
    """``v_{theta,t}(x)`` of the generator ``a z + b``."""
    mean, variance = (1 - t) * b, (1 - t) ** 2 * a**2 + t**2
    covariance = t - (1 - t) * a**2  # of eps - x_0 with x_t
    return -b + covariance / variance * (x - mean)


def true_distance(a, b, teacher, t, weights):
    """Eq. 4.1 in closed form: ``E_t E_{x_t ~ p_theta,t} (u - v_theta)^2``, with the t-integral by
    quadrature."""
    # u - v is affine: evaluate it at the mean, and its slope
    mean, variance = (1 - t) * b, (1 - t) ** 2 * a**2 + t**2
    at_mean = implicit_velocity(mean, t, *teacher) - implicit_velocity(mean, t, a, b)
    slope = (
        implicit_velocity(mean + 1, t, *teacher)
        - implicit_velocity(mean, t, *teacher)
        - implicit_velocity(mean + 1, t, a, b)
        + implicit_velocity(mean, t, a, b)
    )
    return (weights * (at_mean**2 + slope**2 * variance)).sum()


def hermite(n):
    """Nodes and weights for the expectation over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def legendre(n, low=0.05, high=0.95):
    """Nodes and weights for the mean over [low, high]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((high - low) * (nodes + 1) / 2 + low), torch.from_numpy(weights / 2)


class GaussianVelocity(nn.Module):
    """The implicit velocity as a network of the contract, with parameters ``a`` and ``b``."""

    event_shape = (1,)

    def __init__(self, a=1.0, b=0.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x_t, t):
        return implicit_velocity(x_t, t[:, None].double(), self.a, self.b)


class AffineGenerator(nn.Module):
    """``g(z) = a z + b``."""

    def __init__(self, a, b):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, z):
        return self.a * z + self.b
