# Copyright (c) mmfgm authors.
import pytest
import torch
from torch import nn

from mmfgm.models import OneStepGenerator


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
            dict(t_star=0.7, c_skip=0.3, c_out=-0.7, c_in=0.7),
            lambda z: 0.3 * z + 0.7 * (0.7 * z + 1),
        ),  # 5.1 as printed
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


def test_bad_settings():
    with pytest.raises(ValueError, match=r'\[0, 1\]'):
        OneStepGenerator(Probe(), t_star=970)
    with pytest.raises(ValueError, match='set c_out'):
        OneStepGenerator(Probe(), t_star=0.0)
