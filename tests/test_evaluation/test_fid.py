# Copyright (c) mmfgm authors.
import hashlib
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import mmfgm.engine  # noqa: F401
from mmfgm.datasets import GenerationDataset
from mmfgm.errors import UsageError
from mmfgm.evaluation import (
    Evaluation,
    InceptionV3,
    build_feature,
    frechet_distance,
    load_reference,
    to_uint8,
)
from mmfgm.models import Sampling
from mmfgm.registry import DATASETS, TASK_UTILS
from mmfgm.tools import fid_stats
from tests.conftest import run_module

SAMPLING = Sampling('generator_ema')
BANK = dict(type='FilterBank')


@TASK_UTILS.register_module()
class FilterBank:
    """Features that cost nothing: a fixed random map of uint8 pixels; the first ten count as logits
    too."""

    name = 'filter bank'
    dim = 12

    def __call__(self, samples):
        x = to_uint8(samples).flatten(1).double() / 2550
        # rounded from float64, so that the order of summation inside the product cannot show
        return (
            x
            @ torch.randn(x.shape[1], self.dim, generator=torch.Generator().manual_seed(0)).double()
        ).float()

    def logits(self, samples):
        return self(samples)[:, :10]


@DATASETS.register_module()
class Noise(GenerationDataset):
    """Images that are functions of idx."""

    def __getitems__(self, indices):
        return dict(idx=torch.as_tensor(indices), x_0=images(indices, offset=10000, scale=70))


def images(indices, offset=0, scale=50):
    rows = [
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(offset + int(i)))
        for i in indices
    ]
    return (128 + scale * torch.stack(rows)).clip(0, 255).to(torch.uint8)


class Echo:
    """A model whose samples are exact functions of idx, so that only the evaluation can differ."""

    def sample(self, batch, sampling):
        return images(batch['idx']).float() / 127.5 - 1


def evaluate(batch_size, metrics, num_samples=101, model=None):
    with DefaultScope.overwrite_default_scope('mmfgm'):
        evaluation = Evaluation(
            name='e',
            sampling=dict(network='generator_ema'),
            batch_size=batch_size,
            metrics=metrics,
            dataset=dict(type='GenerationDataset', num_samples=num_samples),
        )
        values = evaluation.run(model or Echo(), SAMPLING)
        assert list(values) == evaluation.value_names
        return values


METRICS = dict(
    fid=dict(type='FID', reference=dict(type='Noise', num_samples=150), feature=BANK),
    kid=dict(
        type='KID',
        reference=dict(type='Noise', num_samples=150),
        feature=BANK,
        subsets=5,
        subset_size=40,
    ),
    isc=dict(type='InceptionScore', feature=BANK),
    prc=dict(type='PrecisionRecall', reference=dict(type='Noise', num_samples=150), feature=BANK),
)


def main():
    """Run by every process of a torchrun; prints the metrics of this world size."""
    MMLogger.get_instance('test')
    dist.init_process_group('gloo')
    out = evaluate(16, METRICS)
    if dist.get_rank() == 0:
        print('RESULT', json.dumps(out))
    dist.destroy_process_group()


def test_metrics_are_those_of_the_references():
    generated, real = FilterBank()(images(range(101))), FilterBank()(images(range(150), 10000, 70))
    out = evaluate(64, METRICS)
    x, y = generated.double().numpy(), real.double().numpy()
    assert out['e/fid'] == pytest.approx(
        frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)),
        rel=1e-9,
    )
    kid = kid_features_to_metric(
        generated.double(), real.double(), kid_subsets=5, kid_subset_size=40, verbose=False
    )
    assert [out['e/kid_mean'], out['e/kid_std']] == pytest.approx(list(kid.values()), rel=1e-5)
    isc = isc_features_to_metric(generated[:, :10])
    assert [out['e/isc_mean'], out['e/isc_std']] == pytest.approx(list(isc.values()), rel=1e-5)
    precision, recall, _ = prc_features_to_metric(
        generated, real, prc_neighborhood=3, verbose=False
    ).values()
    assert [out['e/prc_precision'], out['e/prc_recall']] == pytest.approx(
        [float(precision), float(recall)], abs=1e-6
    )


def test_does_not_depend_on_batches_or_processes():
    one = {size: evaluate(size, METRICS) for size in (7, 64)}
    assert one[7] == pytest.approx(one[64], rel=1e-5)
    assert one[7]['e/fid'] == pytest.approx(one[64]['e/fid'], rel=1e-10)
    # 101 samples on two processes: one sees padding, which must not count
    text = run_module('tests.test_evaluation.test_fid', nproc=2).stdout
    two = json.loads(re.search('RESULT (.*)', text).group(1))
    assert two == pytest.approx(one[64], rel=1e-5)
    assert two['e/fid'] == pytest.approx(one[64]['e/fid'], rel=1e-10)


class Repeating(Echo):
    """Gives item 3 twice, as a sampler that pads by repetition would."""

    def sample(self, batch, sampling):
        batch['idx'] = torch.where(batch['idx'] == 4, 3, batch['idx'])
        return super().sample(batch, sampling)


def test_duplicates_are_noticed():
    with pytest.raises(UsageError, match='InceptionScore saw 100 samples of 101'):
        evaluate(64, dict(isc=METRICS['isc']), model=Repeating())


@pytest.mark.parametrize(
    'metric, num_samples, message',
    [
        ('kid', 39, 'KID needs at least 40 samples, but the evaluation has 39'),
        ('isc', 9, 'InceptionScore needs at least 10 samples'),
        ('prc', 3, 'PrecisionRecall needs at least 4 samples'),
        ('fid', 1, 'FID needs at least 2 samples'),
    ],
)
def test_too_few_samples(metric, num_samples, message):
    with pytest.raises(UsageError, match=message):
        evaluate(64, {metric: METRICS[metric]}, num_samples)


def test_too_few_reference_samples():
    metric = {**METRICS['kid'], 'reference': dict(type='Noise', num_samples=30)}
    with pytest.raises(UsageError, match='at least 40 reference samples, but the reference has 30'):
        evaluate(64, dict(kid=metric))


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    """A file of random Inception weights that do not collapse, and its hash."""
    path = tmp_path_factory.mktemp('inception') / 'weights.pth'
    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'load', lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, 'load_state_dict', lambda *args: None)
        FeatureExtractorInceptionV3.__init__(network, 'x', ['2048'], 'nothing')
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_is_torch_fidelitys(inception):
    path, sha256 = inception
    x = torch.rand(3, 3, 32, 32) * 2.2 - 1.1
    ours = InceptionV3(str(path), sha256[:8])
    theirs = FeatureExtractorInceptionV3('x', ['2048', 'logits_unbiased'], str(path))
    # floor(clip(127.5 x + 128, 0, 255)), written another way
    features, logits = theirs(
        torch.from_numpy(
            np.floor(np.clip(x.double().numpy() * 127.5 + 128, 0, 255)).astype(np.uint8)
        )
    )
    assert features.std() > 1e-3
    torch.testing.assert_close(ours(x), features, rtol=0, atol=0)
    torch.testing.assert_close(ours.logits(x), logits, rtol=0, atol=0)
    torch.testing.assert_close(ours(x[:2]), features[:2], rtol=1e-4, atol=1e-5)


def test_one_network_serves_all_metrics(inception):
    cfg = dict(type='InceptionV3', weights=str(inception[0]), sha256=None)
    with DefaultScope.overwrite_default_scope('mmfgm'):
        feature = build_feature(cfg)
        assert build_feature(dict(cfg)) is feature
    calls = []
    feature.network.register_forward_hook(lambda *args: calls.append(1))
    x = torch.zeros(2, 3, 32, 32)
    feature(x), feature.logits(x), feature(x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    'case, message',
    [
        ('missing', 'there are no Inception weights at'),
        ('hash', 'SHA-256 begins with .* not 6726825d'),
        ('shape', r'another network than Inception v3.*(Conv2d_1a_3x3.conv.weight|Missing key)'),
        ('code', 'holds more than tensors'),
    ],
)
def test_wrong_weights(inception, tmp_path, case, message):
    path, sha256 = tmp_path / 'w.pth', None
    if case == 'hash':
        path, sha256 = inception[0], '6726825d'
    elif case == 'shape':
        state = torch.load(inception[0])
        torch.save({**state, 'Conv2d_1a_3x3.conv.weight': torch.zeros(32, 1, 3, 3)}, path)
    elif case == 'code':
        torch.save(nn.Linear(1, 1), path)
    with pytest.raises(UsageError, match=f'(?s){message}'):
        InceptionV3(str(path), sha256)


def test_reference_files(tmp_path):
    out = tmp_path / 'stats.npz'
    config = tmp_path / 'config.py'
    config.write_text(
        f'model = {{}}\nevaluations = dict(e=dict(metrics=dict(fid={METRICS["fid"]!r},'
        f' kid={METRICS["kid"]!r})))'
    )
    fid_stats.main([str(config), str(out), '--evaluation', 'e', '--features'])
    by_file = {
        name: {**metric, 'reference': str(out)} for name, metric in METRICS.items() if name != 'isc'
    }
    assert evaluate(64, by_file) == pytest.approx(
        {k: v for k, v in evaluate(64, METRICS).items() if 'isc' not in k}, rel=1e-6
    )
    with pytest.raises(SystemExit) as stopped:
        fid_stats.main([str(config), str(out), '--evaluation', 'e'])  # exists
    assert stopped.value.code == 2
    # without features, which KID and PRC need
    fid_stats.main([str(config), str(out), '--evaluation', 'e', '--force'])
    with pytest.raises(UsageError, match='hold no features.*--features'):
        evaluate(64, dict(kid={**METRICS['kid'], 'reference': str(out)}))
    # EDM's files have mu and sigma alone
    data = np.load(out)
    np.savez(out, mu=data['mu'], sigma=data['sigma'])
    assert evaluate(64, dict(fid=by_file['fid'])) == pytest.approx(
        evaluate(64, dict(fid=METRICS['fid']))
    )


def test_reference_batch_of_adm(tmp_path):
    """Moments of the whole set, those of spatial features too, which are not used, and images of a
    part of it, whose features KID and precision/recall compare."""
    whole = FilterBank()(images(range(400), 10000, 70)).double().numpy()
    path = str(tmp_path / 'VIRTUAL_imagenet256_labeled.npz')
    np.savez(
        path,
        arr_0=images(range(150), 10000, 70).permute(0, 2, 3, 1).numpy(),
        mu=whole.mean(0),
        sigma=np.cov(whole, rowvar=False),
        mu_s=np.zeros(7),
        sigma_s=np.eye(7),
    )
    by_file = {
        name: {**metric, 'reference': path} for name, metric in METRICS.items() if name != 'isc'
    }
    out = evaluate(64, by_file)
    x = FilterBank()(images(range(101))).double().numpy()
    expected = frechet_distance(
        x.mean(0), np.cov(x, rowvar=False), whole.mean(0), np.cov(whole, rowvar=False)
    )
    assert out.pop('e/fid') == pytest.approx(expected, rel=1e-9)
    # the part is the reference set of METRICS
    of_part = evaluate(64, {name: METRICS[name] for name in by_file if name != 'fid'})
    assert out == pytest.approx(of_part, rel=1e-9)
    # two gigabytes of images that FID does not need stay in the file
    assert load_reference(path, FilterBank()).features is None


@pytest.mark.parametrize(
    'content, message',
    [
        (dict(mu=np.zeros(5), sigma=np.eye(5)), r'dimension \(5,\).*FilterBank has 12 features'),
        (dict(mu=np.zeros(12), sigma=np.eye(5)), r'covariance \(5, 5\)'),
        (dict(mean=np.zeros(12)), r"must hold mu and sigma, but hold \['mean'\]"),
        (
            dict(mu=np.zeros(12), sigma=np.eye(12), feature='pixels'),
            "of the features 'pixels', not 'filter bank'",
        ),
        (None, 'cannot be read as a .npz file'),
    ],
)
def test_wrong_reference_files(tmp_path, content, message):
    path = tmp_path / 'stats.npz'
    if content is None:
        path.write_bytes(b'PK\x03\x04 not really')
    else:
        np.savez(path, **content)
    with pytest.raises(UsageError, match=message):
        load_reference(str(path), FilterBank())


def test_statistics_of_a_folder_need_no_config(tmp_path, inception, monkeypatch):
    from PIL import Image

    for i in range(3):
        Image.fromarray(images([i])[0].permute(1, 2, 0).numpy()).save(tmp_path / f'{i}.png')
    feature = InceptionV3(str(inception[0]), None)
    monkeypatch.setattr('mmfgm.evaluation.build_feature', lambda cfg: feature, raising=False)
    fid_stats.main([str(tmp_path), str(tmp_path / 'out.npz')])
    features = feature(images(range(3))).double().numpy()
    data = np.load(tmp_path / 'out.npz')
    np.testing.assert_allclose(data['mu'], features.mean(0), rtol=1e-6)
    assert data['n'] == 3 and data['feature'] == 'inception-v3-compat'


if __name__ == '__main__':
    sys.exit(main())
