# Copyright (c) mmfgm authors.
import math

import pytest
import torch

from mmfgm.flow import LogitNormal, Uniform


@pytest.mark.parametrize(
    'sampler, median',
    [
        (Uniform(), 0.5),
        (Uniform(0.2, 0.4), 0.3),
        (LogitNormal(2.4, 1.0), 1 / (1 + math.exp(-2.4))),
        (LogitNormal(-1.0, 2.0), 1 / (1 + math.exp(1.0))),
    ],
)
def test_distribution(sampler, median):
    t = sampler(200_000, generator=torch.Generator().manual_seed(0))
    assert t.shape == (200_000,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    assert abs(t.median().item() - median) < 3e-3


def test_logit_normal_has_its_standard_deviation():
    t = LogitNormal(-1.0, 2.0)(200_000, generator=torch.Generator().manual_seed(1)).double()
    logits = (t / (1 - t)).log()
    assert abs(logits.mean().item() + 1) < 0.02 and abs(logits.std().item() - 2) < 0.02


def test_bad_settings():
    with pytest.raises(ValueError, match='std > 0'):
        LogitNormal(0, 0)
    with pytest.raises(ValueError, match='low <= high'):
        Uniform(0.5, 0.2)
