# Copyright (c) mmfgm authors.
import numpy as np
import pytest
import scipy.linalg
import torch

from mmfgm.evaluation import GaussianStats, Moments, frechet_distance


def fit(x):
    moments = Moments()
    moments.update(x)
    return moments.stats()


def reference(a, b):
    """EDM's formula, with scipy's matrix square root of the product."""
    root = scipy.linalg.sqrtm(a.sigma.numpy() @ b.sigma.numpy())
    return float(np.square((a.mu - b.mu).numpy()).sum() + np.trace(a.sigma + b.sigma - 2 * np.real(root)))


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16))
    return torch.from_numpy(rng.normal(size=(500, 16)) @ mix), torch.from_numpy(rng.normal(size=(400, 16)) + 0.3)


def test_agrees_with_the_reference_formula(clouds):
    a, b = map(fit, clouds)
    assert frechet_distance(a, b) == pytest.approx(reference(a, b), rel=1e-9)


def test_closed_form_for_diagonal_gaussians():
    a = GaussianStats(torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor([1., 4., 9.])).double(), 10)
    b = GaussianStats(torch.tensor([1., 0., 2.]).double(), torch.diag(torch.tensor([4., 4., 1.])).double(), 10)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2)**2 + 0 + (3 - 1)**2, abs=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_moments_do_not_depend_on_batches_and_match_numpy(clouds):
    x = clouds[0]
    pieces = Moments()
    for part in x.split(7):
        pieces.update(part)
    stats = pieces.stats()
    torch.testing.assert_close(stats.mu, torch.from_numpy(x.numpy().mean(0)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.sigma, torch.from_numpy(np.cov(x.numpy(), rowvar=False)), rtol=1e-11, atol=1e-11)
    assert frechet_distance(stats, fit(clouds[1])) == pytest.approx(frechet_distance(fit(x), fit(clouds[1])), rel=1e-12)


def test_rank_deficient(clouds):
    x, y = clouds[0][:10], clouds[1]
    assert frechet_distance(fit(x), fit(y)) == pytest.approx(reference(fit(x), fit(y)), rel=1e-3)


def test_float32_features_are_summed_in_float64():
    x = 1000 + torch.randn(10000, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fit(x).sigma, torch.cov(x.double().T), rtol=1e-6, atol=1e-6)


def test_errors(clouds):
    with pytest.raises(ValueError, match='dimension 16 .* dimension 3'):
        frechet_distance(fit(clouds[0]), fit(clouds[0][:, :3]))
    with pytest.raises(ValueError, match='not finite'):
        frechet_distance(fit(clouds[0]), fit(clouds[1] * float('nan')))
    with pytest.raises(ValueError, match='at least 2'):
        fit(clouds[0][:1])
