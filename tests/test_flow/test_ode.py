# Copyright (c) mmfgm authors.
import pytest
import torch

from mmfgm.flow import CountNFE, edm_times, euler, heun, uniform_times


def velocity(x, t):
    """Of the flow between N(0, 1) noise and data at 0 of variance s^2 = 0.25; see `solution`."""
    s2, t = 0.25, t[:, None].double()
    variance = (1 - t) ** 2 * s2 + t**2
    return x * (t - (1 - t) * s2) / variance


def solution(x_1):
    return 0.5 * x_1  # the exact flow scales by the standard deviation


@pytest.fixture
def x_1():
    return torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize('solver, order', [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver, order, x_1):
    def error(steps):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return (solver(velocity, x_1, times) - solution(x_1)).abs().max().item()

    rate = torch.tensor(error(100) / error(200)).log2().item()
    assert abs(rate - order) < 0.15


@pytest.mark.parametrize('solver', [euler, heun])
def test_counts_evaluations_and_times_are_one_per_sample(solver, x_1):
    seen = []

    def spy(x, t):
        seen.append(t)
        return velocity(x, t)

    counted = CountNFE(spy)
    solver(counted, x_1, uniform_times(5))
    assert counted.nfe == 5 * solver.evaluations_per_step == len(seen)
    assert all(t.shape == (64,) and t.dtype == torch.float32 for t in seen)
    assert seen[0][0] == 1


def test_straight_flow_is_exact_in_one_euler_step(x_1):
    x_0 = torch.full_like(x_1, 3.0)
    torch.testing.assert_close(euler(lambda x, t: x_1 - x_0, x_1, uniform_times(1)), x_0)


def test_callback_sees_every_step(x_1):
    steps = []
    out = euler(
        velocity, x_1, uniform_times(3), callback=lambda i, x, t: steps.append((i, x, t.item()))
    )
    assert [i for i, _, _ in steps] == [0, 1, 2] and steps[-1][2] == 0 and steps[-1][1] is out


def test_bad_times(x_1):
    with pytest.raises(ValueError, match='at least 1 step'):
        uniform_times(0)
    with pytest.raises(ValueError, match='1-D tensor'):
        euler(velocity, x_1, torch.tensor(1.0))


def test_edm_times_make_the_steps_of_edms_sampler():
    """Euler on its noise levels, x = x_0 + sigma n, in denoisers of N(0, 0.5^2) (Eq. 5); ours
    starts from pure noise, so both are compared from the second level on."""
    steps = 18
    i = torch.arange(steps, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = edm_times(steps)
    assert times[0] == 1 and times[-1] == 0 and times.dtype == torch.float32
    torch.testing.assert_close(times[1:-1].double(), sigmas[1:] / (1 + sigmas[1:]))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * sigmas[1]
    x_t = x / (1 + sigmas[1])
    for sigma, below in zip(sigmas[1:], [*sigmas[2:], 0.0]):
        denoised = 0.25 / (0.25 + sigma**2) * x
        x = x + (below - sigma) * (x - denoised) / sigma
    torch.testing.assert_close(euler(velocity, x_t, times[1:]), x, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match='0 < sigma_min < sigma_max'):
        edm_times(4, sigma_min=0)
