# Copyright (c) mmfgm authors.
"""Write files as those of CIFAR-10's python version, which the real ones need not be at hand
for."""

import pickle
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate


def write_cifar10(root, images, labels, test_images=None, test_labels=None):
    """Write uint8 images ``(N, 3, 32, 32)`` and their labels to ``root/cifar-10-batches-py``.

    The training images are dealt to five files in order. Without test images, these are the
    training images again.
    """
    folder = Path(root) / 'cifar-10-batches-py'
    folder.mkdir(parents=True, exist_ok=True)
    if test_images is None:
        test_images, test_labels = images, labels
    files = {
        f'data_batch_{i + 1}': part
        for i, part in enumerate(zip(np.array_split(images, 5), np.array_split(labels, 5)))
    }
    for name, (pixels, targets) in {**files, 'test_batch': (test_images, test_labels)}.items():
        pixels = np.asarray(pixels, dtype=np.uint8).reshape(len(pixels), 3072)
        # Python 2 wrote the original: its byte strings b'data' are read with encoding='latin1', as
        # these strings are
        content = dict(data=pixels, labels=[int(label) for label in targets])
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / 'batches.meta').write_bytes(
        pickle.dumps(dict(label_names=[f'class {i}' for i in range(10)]), protocol=2)
    )
    return folder


def write_digits_as_cifar10(root, num_test=297):
    """scikit-learn's 1,797 digits as grey 32x32 images, the last ``num_test`` of them as the test
    set."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255)[:, None]
    images = interpolate(images, size=(32, 32), mode='bilinear', align_corners=False).round().byte()
    images, labels, n = images.expand(-1, 3, -1, -1).numpy(), digits.target, len(images) - num_test
    return write_cifar10(root, images[:n], labels[:n], images[n:], labels[n:])
