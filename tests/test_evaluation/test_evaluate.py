# Copyright (c) mmfgm authors.
import json
import sys

import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

import mmfgm.engine  # noqa: F401
from mmfgm.datasets import PaddedSampler
from mmfgm.errors import UsageError
from mmfgm.evaluation import Evaluation, draw_over_nfe, draw_panels, to_uint8
from mmfgm.models import Sampling
from tests.conftest import run_module


class Echo:
    """A model whose samples are exact functions of idx, so that only the evaluation can differ."""

    def sample(self, batch, sampling):
        rows = [
            torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(int(i)))
            for i in batch['idx']
        ]
        return torch.stack(rows)


class Points(Echo):
    def sample(self, batch, sampling):
        return super().sample(batch, sampling)[:, 0, 0, :2]


def build(metric, batch_size, num_samples=101):
    with DefaultScope.overwrite_default_scope('mmfgm'):
        return Evaluation(
            name='e',
            sampling=dict(network='generator_ema'),
            batch_size=batch_size,
            metrics=dict(m=metric),
            dataset=dict(type='GenerationDataset', num_samples=num_samples, num_classes=10),
        )


FD = dict(type='FrechetDistance', reference=dict(type='Digits'))
SW2 = dict(type='SlicedWasserstein', reference=dict(type='Toy2D', shape='checkerboard', size=500))
SAMPLING = Sampling('generator_ema')


def main():
    """Run by every process of a torchrun; prints both metrics of this world size."""
    MMLogger.get_instance('test')
    dist.init_process_group('gloo')
    out = {
        name: build(metric, 16).run(model, SAMPLING)['e/m']
        for name, metric, model in [('fd', FD, Echo()), ('sw2', SW2, Points())]
    }
    if dist.get_rank() == 0:
        print('RESULT', json.dumps(out))
    dist.destroy_process_group()


@pytest.mark.parametrize('metric, model', [(FD, Echo()), (SW2, Points())])
def test_does_not_depend_on_the_batch_size(metric, model):
    values = {build(metric, size).run(model, SAMPLING)['e/m'] for size in (7, 64, 101)}
    assert max(values) - min(values) <= 1e-10 * max(values)
    # a second run of one object forgets the first
    evaluation = build(metric, 50)
    assert evaluation.value_names == ['e/m']
    assert evaluation.run(model, SAMPLING) == evaluation.run(model, SAMPLING)


@pytest.mark.slow
@pytest.mark.parametrize('nproc', [2, 3])
def test_does_not_depend_on_the_number_of_processes(nproc):
    """101 samples on 2 or 3 processes need padding, which must not count."""
    expected = dict(
        fd=build(FD, 16).run(Echo(), SAMPLING)['e/m'],
        sw2=build(SW2, 16).run(Points(), SAMPLING)['e/m'],
    )
    out = run_module('tests.test_evaluation.test_evaluate', nproc=nproc).stdout
    result = json.loads(
        next(line for line in out.splitlines() if line.startswith('RESULT'))[len('RESULT') :]
    )
    assert result['sw2'] == expected['sw2']
    assert result['fd'] == pytest.approx(expected['fd'], rel=1e-10)


def test_missing_samples_are_noticed():
    evaluation = build(FD, 50)
    evaluation.loader.sampler.size = 60
    with pytest.raises(UsageError, match='saw 60 samples of 101'):
        evaluation.run(Echo(), SAMPLING)


def test_padded_sampler_gives_every_process_as_many(monkeypatch):
    monkeypatch.setattr('mmfgm.datasets.base.get_dist_info', lambda: (1, 3))
    sampler = PaddedSampler(range(10))
    assert list(sampler) == [1, 4, 7, 10] and len(sampler) == 4  # 10 is padding


def test_uint8_rule():
    x = torch.tensor([-1.0, -0.001, 0.0, 1.0, 2.0, -2.0])
    assert to_uint8(x).tolist() == [0, 127, 128, 255, 255, 0]


def test_pictures():
    points = draw_panels({'a': torch.randn(50, 2), 'b': torch.randn(50, 2)})
    images = draw_panels({'a': torch.rand(16, 1, 8, 8) * 2 - 1})
    curve = draw_over_nfe({'teacher': {1: 3.0, 10: 0.2}, 'generator': {1: 0.1}}, 'fd')
    for picture in (points, images, curve):
        assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 1
    with pytest.raises(ValueError, match='cannot draw'):
        draw_panels({'latents': torch.zeros(2, 16, 8, 8)})


def test_bad_interval():
    with pytest.raises(UsageError, match='whole number'):
        Evaluation(name='e', dataset={}, metrics={}, sampling={}, interval='often')


def test_without_metrics():
    with pytest.raises(UsageError, match='evaluations.e has no metrics'):
        Evaluation(
            name='e', dataset=dict(type='GenerationDataset', num_samples=4), metrics={}, sampling={}
        )


if __name__ == '__main__':
    sys.exit(main())
