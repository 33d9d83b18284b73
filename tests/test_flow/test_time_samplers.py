# Copyright (c) mmfgm authors.
import math

import pytest
import torch

from mmfgm.flow import Beta, EDMGrid, LogitNormal, Uniform


@pytest.mark.parametrize(
    'sampler, median',
    [
        (Uniform(), 0.5),
        (Uniform(0.2, 0.4), 0.3),
        (LogitNormal(2.4, 1.0), 1 / (1 + math.exp(-2.4))),
        (LogitNormal(-1.0, 2.0), 1 / (1 + math.exp(1.0))),
        (Beta(2.5, 1.0), 0.5**0.4),  # its distribution function is t^2.5
        (Beta(1.0, 2.0), 1 - 0.5**0.5),
        # SiD's, as its code has it: sigma at r = 0.4
        (EDMGrid(), 0.4911),
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


def test_cut_off_logit_normal_keeps_its_shape_inside():
    """Equal in distribution to the whole density with everything outside thrown away."""
    low, high = 0.05, 0.8
    cut = LogitNormal(0.5, 1.5, low=low, high=high)
    t = cut(200_000, generator=torch.Generator().manual_seed(0))
    assert low <= t.min() and t.max() <= high and t.dtype == torch.float32
    whole = LogitNormal(0.5, 1.5)(600_000, generator=torch.Generator().manual_seed(1))
    whole = whole[(low <= whole) & (whole <= high)]
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(torch.quantile(t, q) - torch.quantile(whole, q)) < 5e-3
    # far in the tail, where the whole density has nothing to keep
    tail = LogitNormal(-6.0, 0.5, low=0.9, high=0.95)(1000)
    assert 0.9 <= tail.min() and tail.max() <= 0.95


def test_grid_ends_where_sid_ends():
    t = EDMGrid()(200_000, generator=torch.Generator().manual_seed(0))
    assert EDMGrid().low <= t.min() and t.max() <= EDMGrid().high
    assert abs(EDMGrid().high - 0.961) < 1e-3 and abs(EDMGrid().low - 0.002) < 1e-4
    # a rehearsal builds models there
    with torch.device('meta'):
        assert EDMGrid().high >= t.max() and EDMGrid().low <= t.min()


def test_bad_settings():
    with pytest.raises(ValueError, match='low < high'):
        LogitNormal(0, 1, low=0.5, high=0.5)
    with pytest.raises(ValueError, match='low <= high'):
        LogitNormal(0, 1, low=0.5, high=0.2)
    with pytest.raises(ValueError, match='a > 0 and b > 0'):
        Beta(0, 1)
    with pytest.raises(ValueError, match='0 < fraction <= 1'):
        EDMGrid(fraction=0)
    with pytest.raises(ValueError, match='std > 0'):
        LogitNormal(0, 0)
    with pytest.raises(ValueError, match='low <= high'):
        Uniform(0.5, 0.2)
