# Copyright (c) mmfgm authors.
import pytest
import torch
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader

from mmfgm.datasets import ConditionDataset, Digits, GenerationDataset, Toy2D, WithReal, collate
from mmfgm.errors import UsageError
from tests.batches import same


def test_digits():
    digits = Digits()
    batch = next(iter(DataLoader(digits, len(digits), collate_fn=collate)))
    assert (
        batch['x_0'].shape == (1797, 1, 8, 8)
        and batch['x_0'].min() == -1
        and batch['x_0'].max() == 1
    )
    assert batch['cond']['labels'].bincount().tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]


def test_batched_and_single_indexing_agree():
    for dataset in (
        Digits(),
        Toy2D('8gaussians', 10),
        GenerationDataset(10, 3, seed=2),
        ConditionDataset(3, 10),
    ):
        whole, single = dataset.__getitems__([3, 7]), collate([dataset[3], dataset[7]])
        assert same(whole, single)


def test_toys_have_their_shape():
    board = Toy2D('checkerboard', 20000).x_0
    cells = (board + 2).floor().long()
    assert (
        cells.min() == 0
        and cells.max() == 3
        and set(((cells[:, 0] + cells[:, 1]) % 2).tolist()) == {0}
    )
    assert (cells[:, 0] * 4 + cells[:, 1]).unique(return_counts=True)[
        1
    ].min() > 2200  # 8 squares, alike
    radius = Toy2D('8gaussians', 20000).x_0.norm(dim=1)
    assert abs(radius.mean() - 2) < 0.02 and abs(radius.std() - 0.1) < 0.01
    with pytest.raises(UsageError, match='checkerboard'):
        Toy2D('moons')


def test_generation_items_are_balanced_and_have_their_own_seeds():
    batch = GenerationDataset(100, 10, seed=1).__getitems__(range(100))
    assert (
        batch['cond']['labels'].bincount().tolist() == [10] * 10
        and len(set(batch['seed'].tolist())) == 100
    )
    other = GenerationDataset(100, 10, seed=2).__getitems__(range(100))
    # torch's CPU generator ignores the upper half of a 64-bit seed
    assert max(other['seed'].tolist()) < 2**32 and not set(other['seed'].tolist()) & set(
        batch['seed'].tolist()
    )
    with pytest.raises(UsageError, match='at least 1'):
        GenerationDataset(0)


def test_conditions_beside_real_samples():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        dataset = WithReal(
            dict(type='ConditionDataset', num_classes=10, size=5),
            dict(type='Toy2D', shape='checkerboard', size=3),
        )
    assert len(dataset) == 5
    batch = dataset.__getitems__([0, 4])
    assert (
        batch['idx'].tolist() == [0, 4]
        and batch['cond']['labels'].tolist() == [0, 4]
        and 'x_0' not in batch
    )
    # the shorter one goes round, shifted
    real = [dataset.real.__getitems__([i])['x_0'] for i in (0, (4 + 7919) % 3)]
    assert torch.equal(batch['real']['x_0'], torch.cat(real))
    assert {int(i) for i in dataset._wrap(range(3, 6), 3)} == {0, 1, 2}
    assert torch.equal(dataset[4]['real']['x_0'], batch['real']['x_0'][1])
