# Copyright (c) mmfgm authors.
"""Images in memory or in files: items ``dict(idx, x_0, cond=dict([labels]))`` with ``x_0 (3, H,
W)`` uint8 and ``labels`` int64."""

import io
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from PIL import Image
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.files import check_regular, files_below, parse_json, read_member
from mmfgm.registry import DATASETS

from .base import Batch, BatchDataset, TensorDataset

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def _cifar10_reader(verify: bool) -> Any:
    """torchvision's reader; without ``verify`` one for any files of CIFAR-10's format."""
    # imported late, as it takes two seconds
    from torchvision.datasets import CIFAR10 as Reader

    if verify:
        return Reader

    class AnyCIFAR10(Reader):
        """Without md5 it only looks whether the files exist."""

        train_list = [[name, None] for name, _ in Reader.train_list]
        test_list = [[name, None] for name, _ in Reader.test_list]
        meta = {**Reader.meta, 'md5': None}

    return AnyCIFAR10


@DATASETS.register_module()
class CIFAR10(TensorDataset):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training or 10,000 test images of 32x32 pixels, all in
    memory.

    Items are ``dict(idx, x_0, cond=dict([labels]))``: ``x_0 (3, 32, 32)`` uint8, ``labels`` 0 to 9.

    Args:
        data_root (str): The folder that holds ``cifar-10-batches-py``, the "python version".
        train (bool): The training images, else the test images.
        labels (bool): Whether items carry labels; False for an unconditional model.
        download (bool): Download if ``cifar-10-batches-py`` is missing; an existing one is never
            touched. The first process of each node downloads, so build the dataset on all
            processes.
        verify (bool): Check that the files are the original ones. False reads any files of the same
            format; they are pickles, so they should come from someone you trust.

    Raises:
        UsageError: If the files are missing and cannot be downloaded, or are not CIFAR-10.
    """

    def __init__(
        self,
        data_root: str = 'data/cifar10',
        train: bool = True,
        labels: bool = True,
        download: bool = True,
        verify: bool = True,
    ):
        reader = _cifar10_reader(verify)
        root = Path(data_root).expanduser()
        folder = root / reader.base_folder
        failure = _download(reader, root, folder) if download else 'download=False'
        if not folder.is_dir():
            raise UsageError(
                f'CIFAR-10 is not in {root} ({failure}): set download=True, or extract {reader.url}'
                f' there, so that {folder} holds data_batch_1 to data_batch_5, test_batch and'
                ' batches.meta'
            )
        try:
            source = reader(root, train)
            images = torch.from_numpy(source.data.transpose(0, 3, 1, 2))
            targets = torch.tensor(source.targets)
            self.num_classes = len(source.classes) if labels else None
            self.event_shape = (3, 32, 32)
            if (
                images.dtype != torch.uint8
                or targets.dtype != torch.int64
                or targets.shape != images.shape[:1]
            ):
                raise ValueError(
                    f'found {len(images)} {images.dtype} images, {len(targets)} {targets.dtype}'
                    ' labels'
                )
            if not 0 <= targets.min() <= targets.max() < len(source.classes):
                raise ValueError(
                    f'labels {targets.min()} to {targets.max()} of {len(source.classes)} classes'
                )
        except Exception as error:  # a damaged pickle can raise anything
            fix = (
                'set verify=False if it holds files of your own in that format'
                if verify
                else 'correct its files'
            )
            raise UsageError(
                f'{folder} cannot be read as CIFAR-10: files are missing, damaged or not the'
                f' original ones ({error}); delete the folder to download it again, or {fix}'
            ) from error
        super().__init__(x_0=images, **(dict(labels=targets) if labels else {}))


def _download(reader: Any, root: Path, folder: Path) -> str | None:
    """Fetch CIFAR-10 where it is missing; returns why it failed, if it did."""
    from torchvision.datasets.utils import download_and_extract_archive

    failure = None
    # nodes may share the disk, so one process tries alone before the first of every node does
    for turn in (is_main_process(), int(os.environ.get('LOCAL_RANK', 0)) == 0):
        if turn and not folder.exists():
            try:
                download_and_extract_archive(
                    reader.url, root, filename=reader.filename, md5=reader.tgz_md5
                )
            except Exception as error:  # whatever it is, the others wait in the barrier
                failure = f'the download failed: {error}'
        barrier()
    return failure


@DATASETS.register_module()
class ImageFolder(BatchDataset):
    """Images anywhere below a folder or in a ``.zip``, with EDM's ``dataset.json`` of labels
    (Karras et al., 2022).

    Items are ``dict(idx, x_0, cond=dict([labels]))``: ``x_0 (3, H, W)`` uint8 RGB, in the order of
    the sorted relative paths. Hidden files are left out. ``dataset.json`` at the top holds
    ``{"labels": [["00000/img00000000.png", 6], ...]}``.

    Args:
        path (str): A folder or a ``.zip`` of png, jpg, jpeg, webp or bmp files.
        labels (bool): Whether items carry the labels of ``dataset.json``; False for an
            unconditional model.
        num_classes (int, optional): Labels lie in ``[0, num_classes)``. Defaults to the largest
            label + 1.
        pipeline (Sequence[dict]): Configs of mmcv transforms, such as ``dict(type='Resize',
            scale=(32, 32))``, for ``dict(img, img_shape, ori_shape)`` with ``img (H, W, 3)`` uint8
            RGB, which it must keep in that form.
        cache (bool): Keep decoded images in memory, in each process that reads them.
        convert (bool): Make 8-bit images of other modes RGB (transparency is dropped) rather than
            raise an error.

    Attributes:
        event_shape (tuple): ``(3, H, W)`` of the first image after the pipeline, which all others
            must share.
        num_classes (int, optional): None without labels.

    Raises:
        UsageError: If there are no images, the labels do not fit them or the pipeline cannot be
            built; on reading, if an image is damaged, not RGB, or not of the size of the first.
    """

    def __init__(
        self,
        path: str,
        labels: bool = True,
        num_classes: int | None = None,
        pipeline: Sequence[dict] = (),
        cache: bool = False,
        convert: bool = False,
    ):
        super().__init__()
        self.path = Path(path).expanduser()
        self.cache = cache
        self.convert = convert
        self._zips = {}
        self._decoded = {}
        files = self._files()
        self.names = sorted(
            name
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.split('/')[-1].startswith('.')
        )
        if not self.names:
            raise UsageError(
                f'{self.path} holds no images; expected {", ".join(SUFFIXES)} files in it or'
                ' below it'
            )
        self.labels = self.num_classes = None
        if labels:
            content = self._read('dataset.json') if 'dataset.json' in files else b'{"labels": null}'
            self.labels, self.num_classes = read_labels(
                content, self.names, num_classes, self.path / 'dataset.json'
            )
        self.pipeline = _build_pipeline(pipeline)
        height, width, channels = self._image(0).shape
        self.event_shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        images = [self._image(index) for index in idx.tolist()]
        channels, height, width = self.event_shape
        for index, image in zip(idx.tolist(), images):
            if image.shape != (height, width, channels):
                raise UsageError(
                    f'{self.path / self.names[index]} is {image.shape[1]}x{image.shape[0]} pixels,'
                    f' expected the {width}x{height} of {self.names[0]}; add Resize or'
                    ' CenterCrop to pipeline'
                )
        x_0 = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return dict(
            idx=idx, x_0=x_0, cond={} if self.labels is None else dict(labels=self.labels[idx])
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_zips': {}, '_decoded': {}}

    def _zip(self) -> zipfile.ZipFile:
        # a forked worker shares its parent's file position, so each process opens its own
        if os.getpid() not in self._zips:
            check_regular(str(self.path))
            self._zips[os.getpid()] = zipfile.ZipFile(self.path)
        return self._zips[os.getpid()]

    def _files(self) -> list[str]:
        """Paths of all files, relative to the top, with ``/`` between their parts."""
        if self.path.is_dir():
            return files_below(str(self.path))
        try:
            return self._zip().namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise UsageError(
                f'{self.path} must be a folder or a .zip file of images: {error}'
            ) from error

    def _read(self, name: str) -> bytes:
        if not self.path.is_dir():
            return read_member(self._zip(), name)
        check_regular(str(self.path / name))
        return (self.path / name).read_bytes()

    def _image(self, index: int) -> np.ndarray:
        """Image ``(H, W, 3)`` uint8 after the pipeline."""
        image = self._decoded[index] if index in self._decoded else self._decode(self.names[index])
        if self.cache:
            self._decoded[index] = image
        if not self.pipeline:
            return image
        # a transform may write in place, which must not reach the cache
        results = dict(img=image.copy(), img_shape=image.shape[:2], ori_shape=image.shape[:2])
        for transform in self.pipeline:
            results = transform(results)
            image = results['img'] if isinstance(results, dict) else results
            if not (
                isinstance(image, np.ndarray)
                and image.dtype == np.uint8
                and image.shape[2:] == (3,)
            ):
                found = (
                    f'{image.dtype} {image.shape}'
                    if isinstance(image, np.ndarray)
                    else type(image).__name__
                )
                raise UsageError(
                    f'{self.path / self.names[index]}: expected (H, W, 3) uint8 pixels all'
                    f' along the pipeline, but {type(transform).__name__} made {found}; remove it,'
                    ' as the model scales'
                )
        return image

    def _decode(self, name: str) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(self._read(name)))
            if self.convert and not image.mode.startswith(
                ('I', 'F')
            ):  # which PIL would clip to 8 bits
                image = image.convert('RGB')
            pixels = np.array(image)
        except Exception as error:  # a damaged file can raise anything
            raise UsageError(
                f'{self.path / name} cannot be read as an image ({error}); replace or remove it'
            ) from error
        if image.mode != 'RGB':
            raise UsageError(
                f'{self.path / name} has mode {image.mode}, but expected RGB; convert the file,'
                ' or set convert=True, which takes 8-bit images'
            )
        return pixels


def read_labels(
    content: bytes, names: Sequence[str], num_classes: int | None, file: str | Path
) -> tuple[Tensor, int]:
    """Labels ``(N,)`` int64 in the order of ``names``, and the number of classes, from a
    ``dataset.json`` in EDM's format.

    Raises:
        UsageError: If it is none, or its labels are not those of the images.
    """
    try:
        entries = parse_json(content, dict)['labels']
        table = dict(entries or {})
        if entries and len(table) != len(entries):
            raise ValueError('a name comes twice')
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f'{file} must hold {{"labels": [["{names[0]}", 0], ...]}}, but does not: {error!r}'
        ) from error
    if not table:
        raise UsageError(
            f'{file} is missing or has no labels: write {{"labels": [["{names[0]}", 0], ...]}} with'
            ' a class number for every image to it, or set labels=False'
        )
    known = set(names)
    for name in [*names, *table]:
        if name not in table:
            raise UsageError(
                f'{file} has no label for the image {name}; add it, remove the image, or set'
                ' labels=False'
            )
        if name not in known:
            raise UsageError(
                f'{file} has a label for {name}, but there is no such image; add it or remove the'
                ' label'
            )
        if type(table[name]) is not int or not 0 <= table[name] < (
            math.inf if num_classes is None else num_classes
        ):
            expected = (
                'from 0 on'
                if num_classes is None
                else f'from 0 to {num_classes - 1} (num_classes={num_classes})'
            )
            raise UsageError(
                f'{file} gives {name} the label {table[name]!r}, but a label must be a whole number'
                f' {expected}'
            )
    labels = torch.tensor([table[name] for name in names])
    return labels, int(labels.max()) + 1 if num_classes is None else num_classes


def _build_pipeline(pipeline: Sequence[dict]) -> list[Callable[[dict], dict]]:
    if not pipeline:
        return []
    try:
        from mmcv.transforms import TRANSFORMS  # imported late, as it takes a second
    except ImportError as error:
        raise UsageError(
            f'pipeline needs mmcv, which does not import ({error}): pip install "onedl-mmcv>=2.3.6"'
        ) from error
    transforms = []
    for cfg in pipeline:
        try:
            # mmcv registers in MMEngine's registry; unnamed, the scope is ours, which MMEngine
            # warns has no transforms
            transforms.append(TRANSFORMS.build({'_scope_': 'mmengine', **cfg}))
        except (
            Exception
        ) as error:  # an unknown type, or whatever a transform thinks of its arguments
            raise UsageError(
                f'pipeline: mmcv cannot build the transform {cfg} ({type(error).__name__}:'
                f' {error}); expected, for example, dict(type="Resize", scale=(32, 32))'
            ) from error
    return transforms
