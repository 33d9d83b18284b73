# Copyright (c) mmfgm authors.
import gzip

import numpy as np
import pytest
import torch

from mmfgm.datasets import FashionMNIST, fashion
from mmfgm.errors import UsageError
from tests.idx_format import idx, write_fashion


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize('below', ['', 'FashionMNIST/raw'])
def test_reads_both_layouts(tmp_path, below, zipped):
    parts = write_fashion(tmp_path / below, zipped=zipped)
    for train, part in ((True, 'train'), (False, 't10k')):
        images, labels = parts[part]
        dataset = FashionMNIST(str(tmp_path), train=train)
        batch = dataset.__getitems__([7, 3])
        assert batch['x_0'].dtype == torch.uint8 and batch['idx'].tolist() == [7, 3]
        assert np.array_equal(batch['x_0'][:, 0], images[[7, 3]])
        assert batch['cond']['labels'].tolist() == labels[[7, 3]].tolist()
        assert len(dataset) == len(images) and dataset.num_classes == 10
    assert FashionMNIST(str(tmp_path), labels=False)[0]['cond'] == {}


def test_debian_s_folder_is_the_default(tmp_path, monkeypatch):
    images, _ = write_fashion(tmp_path, zipped=True)['train']
    monkeypatch.setattr(fashion, 'DEBIAN', tmp_path)
    assert np.array_equal(FashionMNIST().x_0[:, 0], images)


def test_missing_files_name_both_ways_to_get_them(tmp_path):
    with pytest.raises(UsageError, match='apt install dataset-fashion-mnist.*download=True'):
        FashionMNIST(str(tmp_path))


@pytest.mark.parametrize('keep', [0, 10, 16, 1000])
def test_cut_files(tmp_path, keep):
    write_fashion(tmp_path)
    file = tmp_path / 'train-images-idx3-ubyte'
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UsageError, match='cannot be read as an IDX file.*get it again'):
        FashionMNIST(str(tmp_path))


def test_a_cut_gzip(tmp_path):
    write_fashion(tmp_path, zipped=True)
    file = tmp_path / 'train-labels-idx1-ubyte.gz'
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(UsageError, match='cannot be read as an IDX file.*get it again'):
        FashionMNIST(str(tmp_path))


@pytest.mark.parametrize(
    'name, values',
    [
        ('train-images-idx3-ubyte', np.zeros((40, 32, 32), np.uint8)),
        ('train-labels-idx1-ubyte', np.zeros(39, np.uint8)),
        ('train-labels-idx1-ubyte', np.full(40, 10, np.uint8)),
    ],
)
def test_files_of_another_data_set(tmp_path, name, values):
    write_fashion(tmp_path)
    (tmp_path / name).write_bytes(idx(values))
    with pytest.raises(UsageError, match='not Fashion-MNIST.*name the folder'):
        FashionMNIST(str(tmp_path))


def test_no_images_at_all(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / 'train-images-idx3-ubyte').write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    (tmp_path / 'train-labels-idx1-ubyte').write_bytes(idx(np.zeros(0, np.uint8)))
    with pytest.raises(UsageError, match='name the folder|get it again'):
        FashionMNIST(str(tmp_path))


def test_the_real_one():
    """Debian's files are the published ones: their sizes, balance of labels and mean."""
    if not fashion.DEBIAN.is_dir():
        pytest.skip('Debian has it: apt install dataset-fashion-mnist')
    assert gzip.open(next(fashion.DEBIAN.glob('train-images*'))).read(4) == b'\0\0\x08\x03'
    for train, size in ((True, 60000), (False, 10000)):
        dataset = FashionMNIST(train=train)
        assert dataset.cond['labels'].bincount().tolist() == [size // 10] * 10
    # the mean that everybody normalises the training images by
    assert FashionMNIST().x_0.double().mean() / 255 == pytest.approx(0.2860, abs=5e-5)
