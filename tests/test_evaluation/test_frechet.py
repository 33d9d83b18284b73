# Copyright (c) mmfgm authors.
import numpy as np
import pytest
import scipy.linalg
import torch

from mmfgm.errors import UsageError
from mmfgm.evaluation import Pixels, StreamingMoments, frechet_distance


def fit(x):
    moments = StreamingMoments(x.shape[1])
    moments.update(x)
    return moments.mean, moments.cov


def distance(a, b):
    return frechet_distance(*a, *b)


def edm(a, b):
    """EDM's formula, with scipy's matrix square root of the product."""
    (mu_1, cov_1), (mu_2, cov_2) = a, b
    root = scipy.linalg.sqrtm(cov_1.numpy() @ cov_2.numpy())
    return float(
        np.square((mu_1 - mu_2).numpy()).sum()
        + np.trace((cov_1 + cov_2).numpy() - 2 * np.real(root))
    )


def fidelity(a, b):
    """torch-fidelity's formula: roots of the eigenvalues of the product."""
    (mu_1, cov_1), (mu_2, cov_2) = a, b
    trace_root = torch.linalg.eigvals(cov_1 @ cov_2).sqrt().real.sum()
    return float((mu_1 - mu_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root)


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16))
    return torch.from_numpy(rng.normal(size=(500, 16)) @ mix), torch.from_numpy(
        rng.normal(size=(400, 16)) + 0.3
    )


@pytest.mark.parametrize('reference', [edm, fidelity])
def test_agrees_with_the_reference_formulae(clouds, reference):
    a, b = map(fit, clouds)
    assert distance(a, b) == pytest.approx(reference(a, b), rel=1e-9)


@pytest.mark.parametrize('reference', [edm, fidelity])
def test_rank_deficient(clouds, reference):
    x, y = clouds[0][:10], clouds[1]
    assert distance(fit(x), fit(y)) == pytest.approx(reference(fit(x), fit(y)), rel=1e-3)


def test_takes_numpy_and_closed_form_for_diagonal_gaussians():
    a = np.zeros(3), np.diag([1.0, 4.0, 9.0])
    b = np.array([1.0, 0.0, 2.0]), np.diag([4.0, 4.0, 1.0])
    assert distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, abs=1e-12)
    assert distance(a, a) == pytest.approx(0, abs=1e-12)


def test_moments_do_not_depend_on_batches_and_match_numpy(clouds):
    x = clouds[0]
    pieces = StreamingMoments(16)
    for part in x.split(7):
        pieces.update(part)
    assert pieces.n == 500
    torch.testing.assert_close(
        pieces.mean, torch.from_numpy(x.numpy().mean(0)), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        pieces.cov, torch.from_numpy(np.cov(x.numpy(), rowvar=False)), rtol=1e-11, atol=1e-11
    )
    other = fit(clouds[1])
    assert distance((pieces.mean, pieces.cov), other) == pytest.approx(
        distance(fit(x), other), rel=1e-12
    )


def test_float32_features_are_summed_in_float64():
    x = 1000 + torch.randn(10000, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fit(x)[1], torch.cov(x.double().T), rtol=1e-6, atol=1e-6)


def test_errors(clouds):
    with pytest.raises(ValueError, match='dimension 16 .* dimension 3'):
        distance(fit(clouds[0]), fit(clouds[0][:, :3]))
    with pytest.raises(ValueError, match='not finite'):
        distance(fit(clouds[0]), fit(clouds[1] * float('nan')))
    with pytest.raises(ValueError, match='at least 2'):
        fit(clouds[0][:1])
    with pytest.raises(ValueError, match=r'features \(N, 4\), but got \(500, 16\)'):
        StreamingMoments(4).update(clouds[0])


def test_pooled_pixels_are_means_of_squares():
    images = torch.randn(3, 2, 4, 6)
    means = images.reshape(3, 2, 2, 2, 3, 2).mean((3, 5)).flatten(1)
    assert torch.allclose(Pixels(2)(images), means, atol=1e-6)
    # statistics of one must not be taken for the other's
    assert len({Pixels(pool).name for pool in (1, 2, 3)}) == 3
    for pool in (0, 4):
        with pytest.raises(UsageError, match='choose another pool of Pixels'):
            Pixels(pool)(images)
