# Copyright (c) mmfgm authors.
"""The classifier: its tool, its features beside Inception's, and what it says about labels."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfgm.datasets import FashionMNIST, fashion
from mmfgm.errors import UsageError
from mmfgm.evaluation import (
    ClassifierFeatures,
    ConvClassifier,
    LabelAgreement,
    load_reference,
    save_reference,
)
from mmfgm.models import read_state_dict
from mmfgm.registry import METRICS
from mmfgm.tools import train_classifier
from tests.idx_format import write_fashion


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with data, a config of it, and a classifier of it that the tool trained."""
    folder = tmp_path_factory.mktemp('classifier')
    write_fashion(folder / 'data', train=640, test=100, zipped=True)
    (folder / 'config.py').write_text(
        f'model = {{}}\ntrain_dataloader = dict(dataset=dict(type="FashionMNIST", data_root='
        f'{str(folder / "data")!r}))\n'
    )
    out = folder / 'classifier.safetensors'
    train_classifier.main([str(folder / 'config.py'), str(out), '--epochs', '8'])
    return folder


def feature_of(folder):
    return dict(type='ClassifierFeatures', weights=str(folder / 'classifier.safetensors'))


def test_the_tool_trains_and_states_the_accuracy(trained):
    feature = ClassifierFeatures(str(trained / 'classifier.safetensors'))
    data = FashionMNIST(str(trained / 'data'), train=False)
    right = feature.logits(data.x_0).argmax(1) == data.cond['labels']
    assert feature.about['accuracy'] == pytest.approx(right.float().mean().item(), abs=1e-3)
    assert feature.about['accuracy'] > 0.9 and feature.about['num_test'] == 100


def test_equal_seeds_make_equal_files(trained):
    command = [str(trained / 'config.py'), str(trained / 'again.safetensors'), '--epochs', '1']
    train_classifier.main(command)
    once = (trained / 'again.safetensors').read_bytes()
    train_classifier.main([*command, '--force'])
    assert (trained / 'again.safetensors').read_bytes() == once


def test_a_data_set_without_test_images_holds_some_out(tmp_path):
    (tmp_path / 'config.py').write_text(
        'model = {}\ntrain_dataloader = dict(dataset=dict(type="Digits"))\n'
    )
    out = tmp_path / 'digits.safetensors'
    train_classifier.main([str(tmp_path / 'config.py'), str(out), '--epochs', '6'])
    about = ClassifierFeatures(str(out)).about
    assert about['num_test'] == 180 and about['accuracy'] > 0.8
    assert about['event_shape'] == [1, 8, 8]


def test_features_see_uint8_and_floats_alike(trained):
    feature = ClassifierFeatures(str(trained / 'classifier.safetensors'))
    images = FashionMNIST(str(trained / 'data')).x_0[:30]
    assert torch.equal(feature(images), feature(images.float() / 127.5 - 1))
    # what a picture file would hold: values between two grey levels count as the level
    assert torch.equal(feature(images), feature(images.float() / 127.5 - 1 + 1e-3))
    network = ConvClassifier((1, 28, 28), 10)
    network.load_state_dict(load_file(trained / 'classifier.safetensors'))
    features, logits = network(images.float() / 127.5 - 1)
    torch.testing.assert_close(feature(images), features.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feature.logits(images), logits.detach(), rtol=1e-5, atol=1e-5)


def test_metrics_take_it_for_inception(trained):
    """FD of the reference with itself is zero, precision and recall are one; noise is far off."""
    data = dict(type='FashionMNIST', data_root=str(trained / 'data'))
    images = FashionMNIST(str(trained / 'data')).x_0
    values = {}
    for name, samples in dict(same=images, noise=torch.randint_like(images, 256)).items():
        for metric in ('FrechetDistance', 'PrecisionRecall'):
            built = METRICS.build(dict(type=metric, reference=data, feature=feature_of(trained)))
            built.reset(len(samples))
            built.process(dict(idx=torch.arange(len(samples))), samples)
            values.update({f'{name}_{k}': v for k, v in built.evaluate(len(samples)).items()})
    assert values['same_fd'] < 1e-3 < 10 < values['noise_fd']
    assert values['same_precision'] == values['same_recall'] == 1
    assert values['noise_precision'] < 0.1


def test_label_agreement_counts(trained):
    data = FashionMNIST(str(trained / 'data'))
    feature = ClassifierFeatures(str(trained / 'classifier.safetensors'))
    seen = feature.logits(data.x_0[:20]).argmax(1)
    asked = seen.clone()
    asked[[2, 5, 11]] = (asked[[2, 5, 11]] + 1) % 10
    metric = LabelAgreement(feature_of(trained))
    # two batches out of order, the last row of each padding that must not count
    metric.reset(18)
    for rows in (torch.tensor([*range(9, 18), 19]), torch.tensor([*range(9), 18])):
        batch = dict(idx=rows, cond=dict(labels=asked[rows]))
        metric.process(batch, data.x_0[rows])
    assert metric.evaluate(18) == dict(agreement=pytest.approx(15 / 18))
    with pytest.raises(UsageError, match='none; give the .*num_classes'):
        metric.process(dict(idx=torch.arange(2), cond={}), data.x_0[:2])
    with pytest.raises(UsageError, match='logits, which Pixels has not; use ClassifierFeatures'):
        LabelAgreement(dict(type='Pixels'))


def test_statistics_of_another_classifier_are_refused_by_name(trained):
    mine = ClassifierFeatures(str(trained / 'classifier.safetensors'))
    data = dict(type='FashionMNIST', data_root=str(trained / 'data'))
    save_reference(str(trained / 'stats.npz'), load_reference(data, mine), mine)
    assert load_reference(str(trained / 'stats.npz'), mine).n == 640
    path = trained / 'other.safetensors'
    state = {k: v + 0.01 for k, v in load_file(trained / 'classifier.safetensors').items()}
    save_file(state, path, dict(classifier=json.dumps(mine.about)))
    other = ClassifierFeatures(str(path))
    assert other.name != mine.name
    with pytest.raises(UsageError, match=f'{mine.name}.*not.*{other.name}'):
        load_reference(str(trained / 'stats.npz'), other)


def test_wrong_files_and_images(trained, tmp_path):
    save_file(dict(x=torch.zeros(2)), tmp_path / 'x.safetensors')
    (tmp_path / 'y.safetensors').write_text('no tensors')
    for name in ('x', 'y', 'z'):
        with pytest.raises(UsageError, match='no classifier of ours.*train_classifier'):
            ClassifierFeatures(str(tmp_path / f'{name}.safetensors'))
    feature = ClassifierFeatures(str(trained / 'classifier.safetensors'))
    with pytest.raises(UsageError, match=r'\(1, 28, 28\).*\(3, 32, 32\).*train_classifier'):
        feature(torch.zeros(2, 3, 32, 32))


def test_the_tool_refuses(trained, tmp_path, capsys):
    config = str(trained / 'config.py')
    for arguments, message in (
        ([config, 'x.pth'], 'must be a .safetensors'),
        ([config, str(trained / 'classifier.safetensors')], 'overwrite it with --force'),
        ([config, str(tmp_path / 'x.safetensors'), '--epochs', '0'], 'at least 1'),
        (
            [
                config,
                str(tmp_path / 'x.safetensors'),
                '--cfg-options',
                'train_dataloader.dataset.labels=False',
            ],
            'images .* with labels.*labels=True',
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_classifier.main(arguments)
        assert stopped.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_the_released_one_is_as_accurate_as_stated():
    """On the real test images, found as configs find it."""
    feature = ClassifierFeatures('mmfgm::assets/fashion/classifier.safetensors')
    if not fashion.DEBIAN.is_dir():
        pytest.skip('it needs the images: apt install dataset-fashion-mnist')
    data = FashionMNIST(train=False)
    right = feature.logits(data.x_0).argmax(1) == data.cond['labels']
    assert right.float().mean().item() == pytest.approx(feature.about['accuracy'], abs=2e-4)
    state = read_state_dict('mmfgm::assets/fashion/classifier.safetensors')
    assert torch.equal(state['head.weight'], feature.network.head.weight)
