# Copyright (c) mmfgm authors.
import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS

from .base import TensorDataset

# where Debian's package dataset-fashion-mnist puts the files
DEBIAN = Path('/usr/share/datasets/fashion-mnist')
NUM_CLASSES = 10


@DATASETS.register_module()
class FashionMNIST(TensorDataset):
    """Fashion-MNIST (Xiao et al., 2017): 60,000 training or 10,000 test images of 28x28 pixels, all
    in memory.

    Items are ``dict(idx, x_0, cond=dict([labels]))``: ``x_0 (1, 28, 28)`` uint8, ``labels`` 0 to 9.
    The four IDX files may be gzipped. Nothing is ever downloaded.

    Args:
        data_root (str, optional): The folder that holds the files, or torchvision's, which has them
            in ``FashionMNIST/raw``. Defaults to where Debian's package ``dataset-fashion-mnist``
            puts them.
        train (bool): The training images, else the test images.
        labels (bool): Whether items carry labels; False for an unconditional model.

    Raises:
        UsageError: If the files are missing, or are not images of 28x28 pixels with a label each.
    """

    event_shape = (1, 28, 28)

    def __init__(self, data_root: str | None = None, train: bool = True, labels: bool = True):
        # imported late, as it takes two seconds
        from torchvision.datasets.mnist import read_image_file, read_label_file

        root = DEBIAN if data_root is None else Path(data_root).expanduser()
        part = 'train' if train else 't10k'
        images = _read(_find(root, f'{part}-images-idx3-ubyte'), read_image_file)
        targets = _read(_find(root, f'{part}-labels-idx1-ubyte'), read_label_file)
        if (
            images.shape[1:] != self.event_shape[1:]
            or len(images) != len(targets)
            or not 0 <= targets.min() <= targets.max() < NUM_CLASSES
        ):
            raise UsageError(
                f'{root} holds {tuple(images.shape)} images and {len(targets)} labels from'
                f' {targets.min()} to {targets.max()}, not Fashion-MNIST: 28x28 pixels and a label'
                ' from 0 to 9 each; name the folder of the original files'
            )
        self.num_classes = NUM_CLASSES if labels else None
        super().__init__(x_0=images[:, None], **(dict(labels=targets) if labels else {}))


def _find(root: Path, name: str) -> Path:
    """The file of that name in one of the layouts, gzipped or not."""
    for folder in (root, root / 'FashionMNIST' / 'raw'):
        for file in (folder / name, folder / f'{name}.gz'):
            if file.is_file():
                return file
    raise UsageError(
        f'Fashion-MNIST is not in {root} (there is no {name}, gzipped or not): on Debian, run "apt'
        ' install dataset-fashion-mnist" and leave data_root out; elsewhere, let torchvision'
        " download it, torchvision.datasets.FashionMNIST('data/fashion', download=True), and set"
        " data_root='data/fashion'"
    )


def _read(file: Path, reader: Callable[[str], Tensor]) -> Tensor:
    """What torchvision's reader, which knows no gzip, reads from a file."""
    try:
        if file.suffix != '.gz':
            return reader(str(file))
        with tempfile.NamedTemporaryFile() as plain, gzip.open(file) as source:
            shutil.copyfileobj(source, plain)
            plain.flush()
            return reader(plain.name)
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(
            f'{file} cannot be read as an IDX file ({type(error).__name__}: {error}); it is'
            ' damaged: get it again'
        ) from error
