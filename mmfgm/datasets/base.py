# Copyright (c) mmfgm authors.
"""Datasets that index whole batches, the collate function that knows it, and the evaluation
sampler."""

import math
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from mmengine.dist import get_dist_info
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from mmfgm.errors import UsageError
from mmfgm.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS

Batch = dict[str, Any]


@FUNCTIONS.register_module()
def collate(items: Batch | Sequence[dict]) -> Batch:
    """Batch a list of items; a batch that a dataset's ``__getitems__`` made already passes
    through."""
    return items if isinstance(items, dict) else default_collate(items)


class TensorDataset(Dataset):
    """Rows of tensors held in memory, indexed a batch at a time.

    Args:
        **columns (Tensor): Of one length each; items also carry their ``idx``.
    """

    def __init__(self, **columns: Tensor):
        self.columns = columns
        self.metainfo = dict(dataset=type(self).__name__)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        return dict(idx=idx, **{name: column[idx] for name, column in self.columns.items()})

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


@DATASETS.register_module()
class GenerationDataset(Dataset):
    """What to generate in an evaluation: items ``dict(idx, seed, [labels])``, with balanced labels.

    Args:
        num_samples (int): Number of items.
        num_classes (int, optional): Item ``idx`` gets label ``idx % num_classes``; none for an
            unconditional model.
        seed (int): Selects another set of noise. Defaults to 0.
    """

    def __init__(self, num_samples: int, num_classes: int | None = None, seed: int = 0):
        if num_samples < 1:
            raise UsageError(f'num_samples must be at least 1, but is {num_samples}')
        self.num_samples, self.num_classes, self.seed = num_samples, num_classes, seed
        self.metainfo = dict(dataset=type(self).__name__)

    def __len__(self) -> int:
        return self.num_samples

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        # torch's CPU generator sees the lower 32 bits only; the odd factor spreads the ranges of
        # different seeds
        batch = dict(idx=idx, seed=(idx + self.seed * 2654435761) % 2**32)
        if self.num_classes:
            batch['labels'] = idx % self.num_classes
        return batch

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


@DATASETS.register_module()
class ConditionDataset(GenerationDataset):
    """Training items of FGM, which needs no data: ``dict(idx, [labels])`` with balanced labels.

    Args:
        num_classes (int, optional): None for an unconditional model.
        size (int): Items before the sampler shuffles again. Defaults to 65,536.
    """

    def __init__(self, num_classes: int | None = None, size: int = 65536):
        super().__init__(size, num_classes)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = super().__getitems__(indices)
        del batch['seed']
        return batch


@DATASETS.register_module()
class WithReal(Dataset):
    """Conditions to generate for, each beside a real sample for the discriminator: ``dict(idx, ...,
    real_x_0, real_...)``.

    An epoch covers the longer of the two; the shorter one is gone through again, in another order
    each time.

    Args:
        conditions (dict): Config of the dataset of conditions.
        real (dict): Config of the dataset of real samples: items with ``x_0`` and the same
            conditions.
    """

    def __init__(self, conditions: dict, real: dict):
        self.conditions, self.real = DATASETS.build(conditions), DATASETS.build(real)
        self.metainfo = dict(dataset=type(self).__name__)

    def __len__(self) -> int:
        return max(len(self.conditions), len(self.real))

    @staticmethod
    def _wrap(indices: Sequence[int], length: int) -> Sequence[int]:
        # each round starts elsewhere, so that a pair does not repeat with it
        return [(i + i // length * 7919) % length for i in indices]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self.conditions.__getitems__(self._wrap(indices, len(self.conditions)))
        real = self.real.__getitems__(self._wrap(indices, len(self.real)))
        return {
            **batch,
            'idx': torch.as_tensor(indices),
            **{f'real_{k}': v for k, v in real.items() if k != 'idx'},
        }

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


@DATA_SAMPLERS.register_module()
class PaddedSampler(Sampler):
    """Item ``rank, rank + world_size, ...``, equally many on every process.

    Indices from ``len(dataset)`` on are padding, which keeps processes with sharded networks in
    step; metrics leave them out. The dataset must take such an index.

    Attributes:
        skip (set[int]): Items to leave out, the same on every process; those left are shared out
            anew.
    """

    def __init__(self, dataset):
        self.size = len(dataset)
        self.rank, self.world_size = get_dist_info()
        self.skip: Set[int] = frozenset()

    def __len__(self) -> int:
        return math.ceil((self.size - len(self.skip)) / self.world_size)

    def __iter__(self) -> Iterator[int]:
        items = [i for i in range(self.size) if i not in self.skip]
        padding = len(self) * self.world_size - len(items)
        return iter([*items, *range(self.size, self.size + padding)][self.rank :: self.world_size])
