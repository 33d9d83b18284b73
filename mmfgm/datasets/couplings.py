# Copyright (c) mmfgm authors.
"""Pairs of noise and sample that a teacher's ODE connects, drawn by ``tools/draw_couplings.py``."""

from collections.abc import Sequence

import torch

from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS

from .base import Batch, GenerationDataset
from .cached import ShardedCache

AGAIN = 'draw them again with tools/draw_couplings.py CONFIG CHECKPOINT OUT'


@DATASETS.register_module()
class Couplings(ShardedCache):
    """Couplings of a teacher: items ``dict(idx, x_0, eps, cond=dict([labels]))``, where the
    teacher's ODE leads from ``eps`` at t = 1 to ``x_0`` at t = 0.

    Both are ``(N, *event)`` float32, whatever the cache stores. Labels are those of
    :class:`GenerationDataset`, by which the pairs were drawn. A model that names its teacher
    (``model.teacher``) holds it against the manifest before the first iteration, see
    :meth:`check_teacher`.

    Args:
        path (str): The cache's folder.
        verify (bool): As for :class:`ShardedCache`.

    Raises:
        UsageError: As for :class:`ShardedCache`.
    """

    kind = 'couplings'

    def __init__(self, path: str, verify: bool = False):
        super().__init__(path, verify=verify)
        self.event_shape = self.layout['x_0']
        self.num_classes = int(self.manifest['settings'].get('num_classes') or 0)
        self._items = GenerationDataset(len(self), self.num_classes)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self._items.__getitems__(indices)
        rows = [self._locate(index) for index in torch.as_tensor(indices).tolist()]
        x_0, eps = (self._read(rows, name).float() for name in ('x_0', 'eps'))
        return dict(idx=batch['idx'], x_0=x_0, eps=eps, cond=batch['cond'])

    def check_teacher(
        self, teacher: str | None, event_shape: Sequence[int], num_classes: int | None
    ) -> None:
        """Hold the pairs against the model that is to learn from them.

        Args:
            teacher (str, optional): Fingerprint of the weights that must have drawn them; None for
                any.
            event_shape (Sequence[int]): Of the model's samples.
            num_classes (int, optional): Of the model; 0 for an unconditional one, None if it does
                not say.

        Raises:
            UsageError: If another teacher drew them, or they are no samples of such a model.
        """
        found = self.manifest['identity'].get('teacher', {}).get('weights')
        if teacher is not None and found != teacher:
            raise UsageError(
                f'{self.path!r} holds couplings of another teacher: its weights have the checksum'
                f' {found}, expected {teacher} of model.teacher; {AGAIN} of that teacher, or name'
                ' the one that drew them as model.teacher'
            )
        if tuple(event_shape) != self.event_shape:
            raise UsageError(
                f'{self.path!r} holds couplings of shape {self.event_shape}, but the model takes'
                f' {tuple(event_shape)}; {AGAIN} of a teacher of this shape'
            )
        if num_classes is not None and num_classes != self.num_classes:
            raise UsageError(
                f'{self.path!r} holds couplings {self._labels(self.num_classes)}, but the model'
                f' needs them {self._labels(num_classes)}; {AGAIN} of a teacher with as many'
                ' classes, or set num_classes to theirs'
            )

    @staticmethod
    def _labels(classes: int) -> str:
        return f'with labels of {classes} classes' if classes else 'without labels'
