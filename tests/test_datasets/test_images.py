# Copyright (c) mmfgm authors.
import json
import os
import pickle
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from mmfgm.datasets import CIFAR10, ImageFolder, collate
from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS
from tests.batches import concatenate, same
from tests.cifar_format import write_cifar10, write_digits_as_cifar10

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)  # N, H, W, C
LABELS = {'a/1.png': 2, 'a/2.png': 0, 'b/1.png': 1, 'c.bmp': 2, 'd/e/f.PNG': 0}


def write_folder(root, labels=LABELS, pixels=PIXELS):
    for name, image in zip(LABELS, pixels):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    (root / 'a/.hidden.png').write_text('what a Mac leaves beside an image')
    if labels is not None:
        # in another order than the images
        (root / 'dataset.json').write_text(
            json.dumps(dict(labels=[[k, v] for k, v in reversed(labels.items())]))
        )
    return root


def write_zip(folder, file):
    with zipfile.ZipFile(file, 'w') as z:
        for path in sorted(folder.rglob('*'), reverse=True):
            z.write(path, path.relative_to(folder))
    return file


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / 'images')


@pytest.fixture
def cifar(tmp_path):
    images, labels = RNG.integers(0, 256, (23, 3, 32, 32), dtype=np.uint8), RNG.integers(0, 10, 23)
    write_cifar10(tmp_path, images, labels, images[:7] // 2, labels[:7])
    return tmp_path, torch.from_numpy(images), torch.from_numpy(labels)


def test_cifar10_round_trip(cifar):
    root, images, labels = cifar
    dataset = DATASETS.build(dict(type='CIFAR10', data_root=str(root), verify=False))
    batch = dataset.__getitems__(range(23))
    assert batch['x_0'].dtype == torch.uint8 and torch.equal(batch['x_0'], images)
    assert batch['cond']['labels'].dtype == torch.int64 and torch.equal(
        batch['cond']['labels'], labels
    )
    assert len(dataset) == 23 and dataset.num_classes == 10 and dataset.event_shape == (3, 32, 32)
    unlabelled = CIFAR10(root, train=False, labels=False, verify=False)
    test = unlabelled.__getitems__(range(7))
    assert (
        test['cond'] == {}
        and torch.equal(test['x_0'], images[:7] // 2)
        and unlabelled.num_classes is None
    )
    assert same(dataset.__getitems__([3, 1]), collate([dataset[3], dataset[1]]))
    with pytest.raises(IndexError):
        dataset.__getitems__([0, 23])


def test_cifar10_digits(tmp_path):
    write_digits_as_cifar10(tmp_path)
    train, test = CIFAR10(tmp_path, verify=False), CIFAR10(tmp_path, train=False, verify=False)
    assert (len(train), len(test)) == (1500, 297)
    x_0, digits = torch.cat([train.x_0, test.x_0]).double(), load_digits()
    assert torch.cat([train.cond['labels'], test.cond['labels']]).tolist() == digits.target.tolist()
    assert torch.equal(x_0[:, 0], x_0[:, 1]) and torch.equal(x_0[:, 0], x_0[:, 2])
    # bilinear interpolation keeps the mean where the border of the image is empty, as it nearly is
    error = x_0.mean((1, 2, 3)) - torch.from_numpy(digits.images).mean((1, 2)) / 16 * 255
    assert error.abs().mean() < 0.5


def test_cifar10_of_ones_own_files_is_refused_and_not_overwritten(cifar):
    root, *_ = cifar
    with (
        mock.patch('torchvision.datasets.utils.download_and_extract_archive') as download,
        pytest.raises(
            UsageError, match='cifar-10-batches-py cannot be read.*not the original.*verify=False'
        ),
    ):
        CIFAR10(root)
    download.assert_not_called()


@pytest.mark.parametrize(
    'content',
    [
        b'not a pickle',
        pickle.dumps(dict(data=np.zeros((2, 3072), 'uint8'), labels=[0])),
        pickle.dumps(dict(data=np.zeros((2, 3072)), labels=[0, 1])),
        pickle.dumps(dict(data=np.zeros((2, 3072), 'uint8'), labels=[0, 10])),
        None,
    ],
)
def test_cifar10_damaged(cifar, content):
    root, *_ = cifar
    file = root / 'cifar-10-batches-py/test_batch'
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(
        UsageError, match='cifar-10-batches-py cannot be read as CIFAR-10.*delete the folder'
    ):
        CIFAR10(root, train=False, verify=False)


def test_cifar10_missing(tmp_path):
    with pytest.raises(
        UsageError,
        match=r'not in .*nowhere \(download=False\).*cifar-10-batches-py holds data_batch_1',
    ):
        CIFAR10(tmp_path / 'nowhere', download=False)
    with (
        mock.patch(
            'torchvision.datasets.utils.download_and_extract_archive',
            side_effect=OSError('no network'),
        ),
        mock.patch('mmfgm.datasets.images.barrier') as barrier,
        pytest.raises(UsageError, match='not in .*the download failed: no network.*extract https'),
    ):
        CIFAR10(tmp_path / 'nowhere')
    assert barrier.call_count == 2  # the other processes do not hang


@pytest.mark.parametrize(
    'rank, local_rank, shared_disk, downloads',
    [(0, 0, True, 1), (1, 1, False, 0), (8, 0, False, 1), (8, 0, True, 0)],
)
def test_cifar10_is_downloaded_once_a_disk(
    tmp_path, cifar, rank, local_rank, shared_disk, downloads
):
    root, calls = tmp_path / 'data', []

    def fetch(*args, **kwargs):
        calls.append(args)
        write_cifar10(root, *cifar[1:])

    barriers = iter(range(2))

    def barrier():
        # in the first turn the first process writes to its disk, in the second the first of every
        # node to theirs
        if next(barriers) == (0 if shared_disk else 1) and not calls:
            write_cifar10(root, *cifar[1:])

    with (
        mock.patch('torchvision.datasets.utils.download_and_extract_archive', fetch),
        mock.patch('mmfgm.datasets.images.barrier', barrier),
        mock.patch('mmfgm.datasets.images.is_main_process', lambda: rank == 0),
        mock.patch.dict(os.environ, LOCAL_RANK=str(local_rank)),
    ):
        assert len(CIFAR10(root, verify=False)) == 23 and len(calls) == downloads
    assert next(barriers, None) is None


def test_folder_items(folder):
    dataset = DATASETS.build(dict(type='ImageFolder', path=str(folder)))
    batch = dataset.__getitems__(range(5))
    assert batch['x_0'].dtype == torch.uint8 and batch['cond']['labels'].dtype == torch.int64
    assert torch.equal(batch['x_0'], torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert dataset.names == list(LABELS) and batch['cond']['labels'].tolist() == list(
        LABELS.values()
    )
    assert dataset.event_shape == (3, 6, 8) and dataset.num_classes == 3
    assert ImageFolder(folder, num_classes=7).num_classes == 7
    assert same(dataset.__getitems__([4, 1]), collate([dataset[4], dataset[1]]))
    with pytest.raises(IndexError):
        dataset.__getitems__([0, 5])
    unlabelled = ImageFolder(folder, labels=False)
    assert unlabelled[0]['cond'] == {} and unlabelled.num_classes is None
    (folder / 'dataset.json').write_text(json.dumps(dict(labels=LABELS)))  # a dict does as well
    assert same(ImageFolder(folder).__getitems__(range(5)), batch)


@pytest.mark.parametrize('cache', [False, True])
def test_zip_and_workers_give_the_same(folder, cache):
    expected = ImageFolder(folder).__getitems__(range(5))
    zipped = ImageFolder(write_zip(folder, folder.parent / 'images.zip'), cache=cache)
    copy = pickle.loads(pickle.dumps(zipped))
    for dataset in (ImageFolder(folder, cache=cache), zipped, copy, copy):
        assert same(dataset.__getitems__(range(5)), expected)
        for handle in dataset._zips.values():
            handle.close()  # workers that used the handle of their parent would fail now
        batches = list(DataLoader(dataset, 2, num_workers=2, collate_fn=collate))
        assert same(concatenate(batches), expected)
        dataset._zips.clear()


def test_cache_reads_once_and_keeps_what_it_read(folder):
    # mmcv flips into a new array, this one in place
    def invert(results):
        results['img'] ^= 255
        return results

    dataset = ImageFolder(folder, cache=True)
    dataset.pipeline = [invert]
    first = dataset.__getitems__(range(5))
    assert torch.equal(first['x_0'], torch.from_numpy(255 - PIXELS).permute(0, 3, 1, 2))
    (folder / 'c.bmp').unlink()
    assert same(dataset.__getitems__(range(5)), first)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            {'a/2.png': 3},
            r'dataset\.json gives a/2\.png the label 3, .* from 0 to 2 \(num_classes=3\)',
        ),
        ({'a/2.png': -1}, r'a/2\.png the label -1'),
        ({'a/2.png': 0.5}, r'a/2\.png the label 0\.5.*whole number'),
        ({'a/2.png': True}, 'label True'),
        ({'a/2.png': [0, 1]}, r'label \[0, 1\]'),
        ({'a/9.png': 0}, r'label for a/9\.png, but there is no such image'),
        ({'b/1.png': None}, r'b/1\.png the label None'),
    ],
)
def test_labels_that_do_not_fit(folder, change, message):
    write_folder(folder, {**LABELS, **change})
    with pytest.raises(UsageError, match=message):
        ImageFolder(folder, num_classes=3)


@pytest.mark.parametrize(
    'content',
    [
        '{',
        '[]',
        '{}',
        '{"labels": 3}',
        '{"labels": [["a/1.png"]]}',
        '{"labels": [["a/1.png", 0], ["a/1.png", 1]]}',
    ],
)
def test_dataset_json_of_another_layout(folder, content):
    (folder / 'dataset.json').write_text(content)
    with pytest.raises(UsageError, match=r'dataset\.json must hold {"labels": '):
        ImageFolder(folder)


def test_labels_missing(folder):
    write_folder(folder, {k: v for k, v in LABELS.items() if k != 'b/1.png'})
    with pytest.raises(UsageError, match=r'no label for the image b/1\.png'):
        ImageFolder(folder)
    (folder / 'dataset.json').write_text('{"labels": null}')
    with pytest.raises(UsageError, match=r'write {"labels": \[\["a/1\.png", 0\].*labels=False'):
        ImageFolder(folder)
    (folder / 'dataset.json').unlink()
    with pytest.raises(UsageError, match=r'dataset\.json is missing.*labels=False'):
        ImageFolder(folder)
    assert len(ImageFolder(folder, labels=False)) == 5


def test_nothing_to_read(tmp_path):
    with pytest.raises(UsageError, match='holds no images'):
        ImageFolder(tmp_path)
    (tmp_path / 'x.zip').write_text('no zip')
    for name in ('x.zip', 'nowhere'):
        with pytest.raises(UsageError, match=f'{name} must be a folder or a .zip'):
            ImageFolder(tmp_path / name)


def test_sizes_differ(folder):
    Image.fromarray(PIXELS[0, :5]).save(folder / 'b/1.png')
    dataset = ImageFolder(folder)
    assert len(dataset.__getitems__([0, 1, 3, 4])['x_0']) == 4
    with pytest.raises(
        UsageError, match=r'b/1\.png is 8x5 pixels.*expected the 8x6 of a/1\.png; add Resize'
    ):
        dataset.__getitems__([0, 2])
    assert ImageFolder(folder, pipeline=[dict(type='Resize', scale=(4, 3))])[2]['x_0'].shape == (
        3,
        3,
        4,
    )


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', 'I;16'])
def test_modes(folder, mode):
    (folder / 'b/1.png').unlink()
    name = 'b/1.jpg' if mode == 'CMYK' else 'b/1.png'
    deep = Image.fromarray(PIXELS[2, ..., 0].astype('uint16') * 256)
    (deep if mode == 'I;16' else Image.fromarray(PIXELS[2]).convert(mode)).save(folder / name)
    with pytest.raises(
        UsageError, match=rf'{name} has mode {mode}, but expected RGB.*convert=True'
    ):
        ImageFolder(folder, labels=False)[2]
    if mode == 'I;16':
        with pytest.raises(UsageError, match=f'{name} has mode I;16'):
            ImageFolder(folder, labels=False, convert=True)[2]
    else:
        expected = np.asarray(Image.open(folder / name).convert('RGB'))
        assert np.array_equal(
            ImageFolder(folder, labels=False, convert=True)[2]['x_0'].permute(1, 2, 0), expected
        )


def test_unreadable(folder):
    content = (folder / 'b/1.png').read_bytes()
    for damaged in (b'', b'no image', content[: len(content) // 2]):
        (folder / 'b/1.png').write_bytes(damaged)
        dataset = ImageFolder(folder)
        with pytest.raises(UsageError, match=r'b/1\.png cannot be read as an image'):
            dataset.__getitems__(range(5))


def test_pipeline(folder):
    # a red stripe between black ones, which the crop takes off
    stripe = np.zeros((5, 6, 8, 3), 'uint8')
    stripe[:, :, 2:6, 0] = 255
    write_folder(folder, pixels=stripe)
    dataset = ImageFolder(
        folder,
        pipeline=[dict(type='CenterCrop', crop_size=(4, 6)), dict(type='Resize', scale=(2, 3))],
    )
    x_0 = dataset.__getitems__(range(5))['x_0']
    assert dataset.event_shape == (3, 3, 2) and x_0.shape == (5, 3, 3, 2)
    assert (x_0[:, 0] == 255).all() and (x_0[:, 1:] == 0).all()


def test_flip(folder):
    dataset = ImageFolder(folder, pipeline=[dict(type='RandomFlip', prob=1.0)])
    flipped = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).flip(-1)
    for d in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert torch.equal(d.__getitems__(range(5))['x_0'], flipped)


@pytest.mark.parametrize(
    'transform, message',
    [
        (dict(type='Blur'), 'mmcv cannot build.*Blur'),
        (dict(type='Resize', size=3), 'mmcv cannot build.*Resize'),
        (dict(type='CenterCrop', crop_size=-1), 'mmcv cannot build.*CenterCrop'),
        ('Resize', 'mmcv cannot build.*Resize'),
        (
            dict(type='Normalize', mean=[0] * 3, std=[1] * 3),
            r'a/1\.png: expected \(H, W, 3\) uint8.*Normalize made float',
        ),
    ],
)
def test_pipeline_errors(folder, transform, message):
    with pytest.raises(UsageError, match=message):
        ImageFolder(folder, pipeline=[transform])


def test_mmcv_is_needed_for_the_pipeline_only(folder):
    with mock.patch.dict('sys.modules', {'mmcv.transforms': None}):
        assert len(ImageFolder(folder)[0]['x_0']) == 3
        with pytest.raises(UsageError, match='onedl-mmcv'):
            ImageFolder(folder, pipeline=[dict(type='RandomFlip', prob=1.0)])
