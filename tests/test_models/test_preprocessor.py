# Copyright (c) mmfgm authors.
import pytest
import torch

from mmfgm.errors import UsageError
from mmfgm.evaluation import to_uint8
from mmfgm.models import FlowMatching, ImagePreprocessor, Sampling, from_uint8


def test_uint8_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[[0, 255]].tolist() == [-1, 1]


def test_flips_only_while_training_and_about_half():
    x_0 = torch.randint(0, 256, (400, 3, 4, 4), dtype=torch.uint8)
    batch = dict(idx=torch.arange(400), x_0=x_0)
    assert torch.equal(ImagePreprocessor()(batch)['x_0'], from_uint8(x_0))
    torch.manual_seed(0)
    out = ImagePreprocessor(0.25)(batch, training=True)['x_0']
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(out, from_uint8(x_0))]
    kept = [torch.equal(a, b) for a, b in zip(out, from_uint8(x_0))]
    assert all(a != b for a, b in zip(flipped, kept)) and 70 < sum(flipped) < 130
    assert torch.equal(
        ImagePreprocessor(1.0)(batch, training=True)['x_0'], from_uint8(x_0).flip(-1)
    )
    with pytest.raises(UsageError, match='flip_prob'):
        ImagePreprocessor(50)


def build(num_classes):
    return FlowMatching(
        dict(
            type='AdaLNMLP',
            event_shape=(1, 2, 2),
            width=8,
            depth=1,
            embed_dim=8,
            num_classes=num_classes,
        ),
        time_sampler=dict(type='Uniform'),
    )


@pytest.mark.parametrize(
    'num_classes, labels, message',
    [
        (3, [0, 3], r'must lie in \[0, 2\], but the dataset gives 0 to 3'),
        (3, [-1, 2], 'gives -1 to 2'),
        (3, None, '3 classes, but the dataset gives no labels'),
        (0, [0, 1], '0 classes, but the dataset gives labels'),
    ],
)
def test_labels_that_do_not_fit(num_classes, labels, message):
    model = build(num_classes)
    batch = dict(idx=torch.arange(2), seed=torch.arange(2), x_0=torch.zeros(2, 1, 2, 2))
    if labels is not None:
        batch['cond'] = dict(labels=torch.tensor(labels))
    with pytest.raises(UsageError, match=message):
        model.prepare(batch, differentiable=False)
    with pytest.raises(UsageError, match=message):
        model.sample(batch, Sampling('network', nfe=1))
