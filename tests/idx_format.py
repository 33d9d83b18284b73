# Copyright (c) mmfgm authors.
"""Small files of Fashion-MNIST's format."""

import gzip
import struct

import numpy as np


def idx(values):
    """The bytes of a uint8 array in the IDX format (LeCun): a magic number, big-endian sizes, the
    values."""
    return (
        struct.pack(f'>BBBB{values.ndim}I', 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    )


def write_fashion(folder, train=40, test=20, zipped=False, seed=0):
    """Write the four files; returns images and labels by part. Class ``k`` is a bright band of rows
    from ``2 k`` on, under noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for part, size in dict(train=train, t10k=test).items():
        labels = (np.arange(size) % 10).astype(np.uint8)
        images = rng.integers(0, 80, (size, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 4] += 150
        parts[part] = images, labels
        for name, values in (('images-idx3', images), ('labels-idx1', labels)):
            content = idx(values)
            file = folder / f'{part}-{name}-ubyte{".gz" if zipped else ""}'
            file.write_bytes(gzip.compress(content) if zipped else content)
    return parts
