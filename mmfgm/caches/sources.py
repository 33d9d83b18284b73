# Copyright (c) mmfgm authors.
"""Where prompts, images and captions come from."""

import csv
import io
import os.path as osp
import tarfile
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmfgm.datasets import SUFFIXES, read_labels
from mmfgm.errors import UsageError
from mmfgm.files import check_regular, files_below, parse_json, read_member


def read_prompts(path: str, column: str) -> tuple[list[str], list[Any]]:
    """Where each prompt is (``'line 3'``), and what is there, which may be no prompt.

    Raises:
        UsageError: If the file is missing, of another kind, damaged or without the column.
    """
    extension = osp.splitext(path)[1].lower()
    readers = {
        '.txt': _read_txt,
        '.jsonl': _read_jsonl,
        '.csv': _read_csv,
        '.parquet': _read_parquet,
    }
    if extension not in readers:
        raise UsageError(
            f'prompts come from {", ".join(readers)} files, but {path!r} is none of them;'
            ' convert it'
        )
    check_regular(path)
    try:
        places, prompts = zip(*readers[extension](path, column))
    except OSError as e:
        raise UsageError(f'{path!r} cannot be read: {e}') from e
    except UnicodeDecodeError as e:
        raise UsageError(f'{path!r} is not UTF-8 text ({e}); convert it') from e
    except ValueError as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(f'{path!r} holds no prompts; write some to it, or name another') from e
    return list(places), list(prompts)


def _read_txt(path, column):
    with open(path, encoding='utf-8-sig', newline=None) as f:
        return [(f'line {number}', line.rstrip('\n')) for number, line in enumerate(f, 1)]


def _read_jsonl(path, column):
    items = []
    with open(path, encoding='utf-8-sig') as f:
        for number, line in enumerate(f, 1):
            try:
                items.append((f'line {number}', parse_json(line, dict)[column]))
            except (ValueError, KeyError, TypeError) as e:
                raise UsageError(
                    f'{path!r}, line {number}: expected an object with {column!r}, found '
                    f'{line.strip()[:80]!r} ({e!r}); correct it, or name the field with --column'
                ) from e
    return items


def _read_csv(path, column):
    with open(path, encoding='utf-8-sig', newline='') as f:
        reader = csv.DictReader(f)
        try:
            if column not in (reader.fieldnames or ()):
                raise UsageError(
                    f'{path!r} has no column {column!r}, but {reader.fieldnames}; name one with'
                    ' --column'
                )
            # a quoted prompt may have several lines; the number is of its last
            return [(f'line {reader.line_num}', row[column]) for row in reader]
        except csv.Error as e:
            raise UsageError(f'{path!r}, line {reader.line_num}: {e}; correct it') from e


def _read_parquet(path, column):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as e:
        raise UsageError(
            f'reading {path!r} needs pyarrow, which does not import ({e}): pip install pyarrow, or'
            ' convert the file to .jsonl'
        ) from e
    try:
        names = parquet.read_schema(path).names
        if column not in names:
            raise UsageError(
                f'{path!r} has no column {column!r}, but {names}; name one with --column'
            )
        prompts = parquet.read_table(path, columns=[column])[column].to_pylist()
        return [(f'row {row}', prompt) for row, prompt in enumerate(prompts)]
    except ArrowException as e:
        raise UsageError(f'{path!r} cannot be read as parquet: {e}') from e


class ImageFiles:
    """The files below a folder, in a ``.zip``, or in ``.tar`` shards, by their sorted relative
    names.

    Raises:
        UsageError: If there are none, or an archive is damaged.
    """

    def __init__(self, path: str):
        self.path = path
        self.zip = None
        self.tars = {}
        check_regular(path)
        try:
            if osp.isdir(path):
                names = files_below(path)
                self.sizes = {name: osp.getsize(osp.join(path, name)) for name in names}
                tars = [osp.join(path, name) for name in sorted(names) if name.endswith('.tar')]
                if tars and not any(name.lower().endswith(SUFFIXES) for name in names):
                    self._index(tars)
            elif path.endswith('.tar'):
                self._index([path])
            else:
                self.zip = zipfile.ZipFile(path)
                self.sizes = {info.filename: info.file_size for info in self.zip.infolist()}
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as e:
            raise UsageError(
                f'images come from a folder, a .zip, a .tar or a folder of .tar, but {path!r}'
                f' cannot be read as one: {e}'
            ) from e
        self.images = sorted(
            name
            for name in self.sizes
            if name.lower().endswith(SUFFIXES) and not name.split('/')[-1].startswith('.')
        )
        if not self.images:
            raise UsageError(f'{path!r} holds no images; expected {", ".join(SUFFIXES)} files')

    def _index(self, tars: Sequence[str]) -> None:
        """Remember where each file lies, so that any can be read without the ones before it."""
        for tar in tars:
            prefix = '' if tar == self.path else f'{osp.relpath(tar, self.path)}/'
            with tarfile.open(tar, 'r:') as f:
                self.tars.update(
                    {
                        prefix + member.name: (tar, member.offset_data, member.size)
                        for member in f
                        if member.isfile()
                    }
                )
        self.sizes = {name: size for name, (_, _, size) in self.tars.items()}

    def read(self, name: str) -> bytes:
        if self.zip is not None:
            return read_member(self.zip, name)
        if self.tars:
            tar, offset, size = self.tars[name]
            with open(tar, 'rb') as f:
                f.seek(offset)
                return f.read(size)
        check_regular(osp.join(self.path, name))
        with open(osp.join(self.path, name), 'rb') as f:
            return f.read()


def read_image(content: bytes, resolution: int) -> Tensor:
    """Pixels ``(3, resolution, resolution)`` in [-1, 1]: shorter side resized, centre cut out.

    Raises:
        UsageError: If it is damaged, or has more than 8 bits a channel.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode.startswith(('I', 'F')):  # which PIL would clip
            raise ValueError(f'mode {image.mode}, expected 8-bit images')
        image = image.convert('RGB')
    except Exception as e:  # a damaged file can raise anything
        raise UsageError(f'cannot be read as an image ({e})') from e
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise UsageError(
            f'is {image.width}x{image.height} pixels, so that {resolution} for its shorter side'
            f' would make {width}x{height}; cut it'
        )
    left = (width - resolution) // 2
    top = (height - resolution) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + resolution, top + resolution)
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def read_captions(files: ImageFiles, source: str) -> list[str | None]:
    """The caption of each image, None where there is none."""
    if source == 'txt':
        names = [f'{osp.splitext(name)[0]}.txt' for name in files.images]
        return [
            files.read(name).decode('utf-8', 'replace').strip() if name in files.sizes else None
            for name in names
        ]
    names, texts = (read_prompts(source, column)[1] for column in ('file_name', 'text'))
    captions = dict(zip(map(str, names), texts))
    unknown = [name for name in captions if name not in files.sizes]
    if unknown:
        raise UsageError(
            f'{source!r} has captions for {len(unknown)} files that are not in {files.path!r}, such'
            f' as {unknown[0]!r}; file_name is relative to it'
        )
    return [captions.get(name) for name in files.images]


def read_classes(files: ImageFiles, source: str) -> tuple[list[int], list[str]]:
    """The label of each image, and the names of the classes in the order of their numbers.

    Args:
        files (ImageFiles): The images.
        source (str): ``'folders'``: the folder, or ``.tar``, at the top that an image lies in, by
            sorted names, as ImageNet and torchvision have it; or ``'json'``: EDM's ``dataset.json``
            at the top, whose classes have no names but numbers.

    Raises:
        UsageError: If an image has no class, or all have one.
    """
    if source == 'json':
        content = (
            files.read('dataset.json') if 'dataset.json' in files.sizes else b'{"labels": null}'
        )
        labels, count = read_labels(
            content, files.images, None, osp.join(files.path, 'dataset.json')
        )
        return labels.tolist(), [str(number) for number in range(count)]
    outside = [name for name in files.images if '/' not in name]
    if outside:
        raise UsageError(
            f'expected every image of {files.path!r} in the folder of its class, found'
            f' {outside[0]!r} at the top; move it, or give a dataset.json and --labels json'
        )
    folders = [name.split('/')[0] for name in files.images]
    classes = sorted(set(folders))
    if len(classes) == 1:
        raise UsageError(
            f'expected a folder for each class at the top of {files.path!r}, found all images in'
            f' {classes[0]!r}; name that folder instead, or pack what is in it'
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[folder] for folder in folders], classes
