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

from mmfgm.errors import NonFiniteInputError, UsageError
from mmfgm.processes import is_finite
from mmfgm.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS

Batch = dict[str, Any]


@FUNCTIONS.register_module()
def collate(items: Batch | Sequence[dict]) -> Batch:
    """Batch a list of items; a batch that a dataset's ``__getitems__`` made already passes
    through."""
    return items if isinstance(items, dict) else default_collate(items)


def item_seed(idx: Any, seed: int = 0) -> Any:
    """Seed of the noise of item ``idx``, a number or a tensor of them; another ``seed`` selects
    other noise.

    torch's CPU generator sees the lower 32 bits only; the odd factor spreads the ranges of
    different seeds.
    """
    return (idx + seed * 2654435761) % 2**32


def check_finite_batch(batch: Batch, dataset: Any) -> None:
    """Refuse training data with inf or nan, before a step on it ruins the weights.

    Call it while the batch is on the CPU, where looking waits for nothing.

    Args:
        batch (dict): Of a training's loader; see :class:`BatchDataset`.
        dataset: Where it comes from.

    Raises:
        NonFiniteInputError: Names the items.
    """
    for place, values in dict(data=batch, real=batch.get('real') or {}).items():
        named = {name: values.get(name) for name in ('x_0', 'eps')} | (values.get('cond') or {})
        for name, value in named.items():
            if not isinstance(value, Tensor) or is_finite(value):
                continue
            rows = (
                value.reshape(len(value), -1)
                .isfinite()
                .all(1)
                .logical_not()
                .nonzero()
                .flatten()
                .tolist()
            )
            items = [int(batch['idx'][row]) for row in rows[:4]]
            where = '; '.join(map(getattr(dataset, 'where', 'item {}'.format), items))
            raise NonFiniteInputError(
                f'{name} of the training data ({type(dataset).__name__}, {place}) holds inf or nan'
                f' in {len(rows)} of {len(value)} items of a batch: {where}. Nothing was trained on'
                ' it; correct these, or make their cache again, and resume'
            )


def _first(batch: Batch) -> Batch:
    return {
        name: _first(value) if isinstance(value, dict) else value[0]
        for name, value in batch.items()
    }


class BatchDataset(Dataset):
    """A dataset that indexes whole batches: a subclass implements ``__getitems__`` and ``__len__``.

    Batches are ``dict(idx, [seed], [x_0], [eps], cond=dict(...), [real=dict(x_0, cond)])``.
    Networks get what is in ``cond``, as keyword arguments, and nothing else.
    """

    def __init__(self):
        # MMEngine's hooks look for it
        self.metainfo = dict(dataset=type(self).__name__)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        raise NotImplementedError(f'{type(self).__name__} does not say what its batches are')

    def where(self, index: int) -> str:
        """What a user would look for to see an item, for messages."""
        return f'item {index}'

    def caption(self, index: int) -> str:
        """What an item shows, in words, for pictures: by default its label, or else its number."""
        labels = self.__getitems__([index]).get('cond', {}).get('labels')
        return f'item {index}' if labels is None else str(int(labels[0]))

    def __getitem__(self, index: int) -> Batch:
        return _first(self.__getitems__([index]))


class TensorDataset(BatchDataset):
    """Rows of tensors held in memory: items ``dict(idx, x_0, cond=dict(...))``.

    Args:
        x_0 (Tensor): Samples ``(N, *event)``.
        **cond (Tensor): Conditions, one row for each sample.
    """

    def __init__(self, x_0: Tensor, **cond: Tensor):
        super().__init__()
        self.x_0 = x_0
        self.cond = cond

    def __len__(self) -> int:
        return len(self.x_0)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        cond = {name: column[idx] for name, column in self.cond.items()}
        return dict(idx=idx, x_0=self.x_0[idx], cond=cond)


@DATASETS.register_module()
class GenerationDataset(BatchDataset):
    """What to generate in an evaluation: items ``dict(idx, seed, cond=dict([labels]))``, with
    balanced labels.

    Args:
        num_samples (int): Number of items.
        num_classes (int, optional): Item ``idx`` gets label ``idx % num_classes``; none for an
            unconditional model.
        seed (int): Selects another set of noise. Defaults to 0.
    """

    def __init__(self, num_samples: int, num_classes: int | None = None, seed: int = 0):
        super().__init__()
        if num_samples < 1:
            raise UsageError(f'num_samples must be at least 1, but is {num_samples}')
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        cond = dict(labels=idx % self.num_classes) if self.num_classes else {}
        return dict(idx=idx, seed=item_seed(idx, self.seed), cond=cond)


@DATASETS.register_module()
class ConditionDataset(GenerationDataset):
    """Training items of FGM, which needs no data: ``dict(idx, cond=dict([labels]))`` with balanced
    labels.

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
class WithReal(BatchDataset):
    """Conditions to generate for, each beside a real sample for the discriminator: ``dict(idx,
    cond=dict(...), real=dict(x_0, cond=dict(...)))``.

    An epoch covers the longer of the two; the shorter one is gone through again, in another order
    each time.

    Args:
        conditions (dict): Config of the dataset of conditions.
        real (dict): Config of the dataset of real samples: items with ``x_0`` and the same
            conditions.
    """

    def __init__(self, conditions: dict, real: dict):
        super().__init__()
        self.conditions = DATASETS.build(conditions)
        self.real = DATASETS.build(real)

    def __len__(self) -> int:
        return max(len(self.conditions), len(self.real))

    def where(self, index: int) -> str:
        real = self.real.where(*self._wrap([index], len(self.real)))
        conditions = self.conditions.where(*self._wrap([index], len(self.conditions)))
        return f'{conditions} of the conditions or {real} of the real samples'

    def caption(self, index: int) -> str:
        return self.conditions.caption(*self._wrap([index], len(self.conditions)))

    def real_caption(self, index: int) -> str:
        """Of the real sample beside the conditions."""
        return self.real.caption(*self._wrap([index], len(self.real)))

    @staticmethod
    def _wrap(indices: Sequence[int], length: int) -> Sequence[int]:
        # each round starts elsewhere, so that a pair does not repeat with it
        return [(i + i // length * 7919) % length for i in indices]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self.conditions.__getitems__(self._wrap(indices, len(self.conditions)))
        real = self.real.__getitems__(self._wrap(indices, len(self.real)))
        real = dict(x_0=real['x_0'], cond=real['cond'])
        return {**batch, 'idx': torch.as_tensor(indices), 'real': real}


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
