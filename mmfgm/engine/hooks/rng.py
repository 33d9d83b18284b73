# Copyright (c) mmfgm authors.
import random
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook

from mmfgm.errors import UsageError
from mmfgm.registry import HOOKS


def get_rng_state() -> dict[str, Any]:
    """States of python's, numpy's, torch's and the current CUDA device's generator, as plain
    values."""
    name, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), *rest),  # type: ignore[attr-defined]
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`get_rng_state`."""
    random.setstate(state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def _check(states: Any) -> None:
    """Try the states on generators that nobody uses.

    Raises:
        UsageError: If they are none.
    """
    try:
        for state in states:
            random.Random().setstate(state['python'])
            name, keys, *rest = state['numpy']
            np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *rest))
            torch.Generator().set_state(state['torch'])
            if not isinstance(state['cuda'], (torch.Tensor, type(None))):
                raise TypeError('cuda')
    except Exception as e:  # they may be anything
        raise UsageError(
            f'the random states in the checkpoint are not what a run saves ({e!r}); resume another'
        ) from e


@contextmanager
def preserve_rng():
    """Whatever is drawn inside does not move the training's random numbers."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Put each process's random state into checkpoints, and take it out on resume.

    It is restored just before the first iteration, because building the loader draws from it.
    """

    priority = 'VERY_LOW'
    _state = None

    def before_save_checkpoint(self, runner, checkpoint):
        # a checkpoint may be written between loading and the first iteration
        checkpoint['rng'] = self._state or get_rng_state()

    def after_load_checkpoint(self, runner, checkpoint):
        if not runner._resume:
            return
        states = checkpoint['rng']
        _check(states)
        if len(states) != get_world_size():
            runner.logger.warning(
                f'The checkpoint was written by {len(states)} processes and is resumed by'
                f' {get_world_size()}: training goes on with fresh random numbers, so it will not'
                ' repeat the interrupted run bit for bit.'
            )
            return
        self._state = states[get_rank()]

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self._state is not None:
            set_rng_state(self._state)
            self._state = None
