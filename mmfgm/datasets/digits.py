# Copyright (c) mmfgm authors.
import torch

from mmfgm.registry import DATASETS

from .base import TensorDataset


@DATASETS.register_module()
class Digits(TensorDataset):
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI Optical Recognition).

    Items are ``dict(idx, x_0, cond=dict(labels))``: ``x_0 (1, 8, 8)`` float32 in [-1, 1], labels 0
    to 9.
    """

    def __init__(self):
        # imported late, as it takes over a second
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # 0..16 to [-1, 1]
        super().__init__(x_0=images, labels=torch.from_numpy(digits.target).long())
