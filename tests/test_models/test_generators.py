# Copyright (c) mmfgm authors.
import pytest
import torch
from torch import nn

from mmfgm.models import OneStepGenerator
from tests.gaussians import GaussianVelocity


class Probe(nn.Module):
    """Returns its input and remembers what it was called with."""

    def forward(self, x_t, t, **cond):
        self.t, self.cond = t, cond
        return x_t + 1


@pytest.fixture
def z():
    return torch.randn(4, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    'settings, expected',
    [
        (dict(), lambda z: z - (z + 1)),  # t* = 1
        (dict(t_star=0.97, c_in=0.8), lambda z: z - 0.97 * (0.8 * z + 1)),  # B.2
        (dict(t_star=0.25, c_out=1.0), lambda z: z - (z + 1)),  # C.1
        (
            dict(t_star=0.7, c_skip=0.7, c_in=0.7),
            lambda z: 0.7 * z - 0.7 * (0.7 * z + 1),
        ),  # 5.1, in our sign
    ],
)
def test_parameterisations_of_the_paper(z, settings, expected):
    network = Probe()
    torch.testing.assert_close(OneStepGenerator(network, **settings)(z, labels=1), expected(z))
    assert (
        network.t.shape == (4,)
        and network.t.dtype == torch.float32
        and network.cond == dict(labels=1)
    )
    assert network.t[0].item() == pytest.approx(settings.get('t_star', 1))


@pytest.mark.parametrize('t_star', [0.5, 0.8, 1.0])
def test_equation_5_1_starts_at_the_mean_of_the_data(t_star):
    """For the flow of N(0.3, 0.5^2) one denoising step from t* z is centred on the side of the
    data; with the printed sign of c_out it is on the other."""
    flow = GaussianVelocity(0.5, 0.3)
    z = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
    denoised = t_star * z - t_star * flow(t_star * z, torch.full((101,), t_star))
    ours = OneStepGenerator(flow, t_star=t_star, c_skip=t_star, c_in=t_star)
    torch.testing.assert_close(ours(z), denoised, rtol=1e-6, atol=1e-7)
    printed = OneStepGenerator(flow, t_star=t_star, c_skip=1 - t_star, c_out=-t_star, c_in=t_star)
    assert ours(z).mean() > 0 > printed(z).mean()
    if t_star == 1:
        torch.testing.assert_close(ours(z).mean().item(), 0.3)
        torch.testing.assert_close(printed(z).mean().item(), -0.3)


def test_bad_settings():
    with pytest.raises(ValueError, match=r'\[0, 1\]'):
        OneStepGenerator(Probe(), t_star=970)
    with pytest.raises(ValueError, match='set c_out'):
        OneStepGenerator(Probe(), t_star=0.0)
