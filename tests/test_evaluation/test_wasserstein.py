# Copyright (c) mmfgm authors.
import math

import numpy as np
import pytest
import scipy.optimize
import torch

from mmfgm.evaluation import sliced_wasserstein


def test_translation():
    """W_2 of a shift along each direction is the projected shift; its mean square over the circle
    is |s|^2 / 2."""
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 4.0])
    assert sliced_wasserstein(x, x + shift) == pytest.approx(5 / math.sqrt(2), rel=1e-6)
    assert sliced_wasserstein(x, x[torch.randperm(1000)]) == 0


@pytest.mark.parametrize('n, m', [(6, 6), (4, 6), (5, 7), (3, 12)])
def test_one_dimension_is_the_transport_problem(n, m):
    rng = np.random.default_rng(n * m)
    x, y = rng.normal(size=n), rng.normal(size=m)
    cost = (x[:, None] - y[None, :]) ** 2
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    plan = scipy.optimize.linprog(
        cost.ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]),
    )
    distance = sliced_wasserstein(torch.from_numpy(x)[:, None], torch.from_numpy(y)[:, None])
    assert distance == pytest.approx(math.sqrt(plan.fun), rel=1e-7)


def test_gaussians_in_the_plane():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200_000, 2, generator=g), 2 * torch.randn(100_000, 2, generator=g)
    assert sliced_wasserstein(x, y, 16) == pytest.approx(1.0, abs=0.01)


def test_errors():
    with pytest.raises(ValueError, match='one dimension'):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match='non-empty'):
        sliced_wasserstein(torch.zeros(0, 2), torch.zeros(3, 2))
