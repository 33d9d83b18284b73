# Copyright (c) mmfgm authors.
"""Checkpoints that survive a crash: written beside their final name, then renamed.

A run on one device or with DDP writes one file, a sharded run a directory, while it goes on if
``strategy.async_checkpoints`` says so. Either holds only
tensors and plain containers, so it loads with ``weights_only=True``.
"""

import copy
import os.path as osp
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import mmengine
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mmengine.dist import (
    all_gather_object,
    barrier,
    broadcast_object_list,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.logging import HistoryBuffer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from mmfgm.errors import EXIT_USAGE, DamagedError, NonFiniteInputError, UsageError
from mmfgm.files import disk_errors, replace_folder, whole_file
from mmfgm.models import (
    CHECKSUMS,
    EXTRAS,
    INDEX,
    SHARDS,
    STATE_DICT,
    check_finite,
    check_shards,
    checksums_of,
    fingerprint,
    index_checksum,
    load_shards,
    newest_whole,
    read_pickle,
    read_state_dict,
    shard_checksums,
    sharded_shapes,
)
from mmfgm.processes import on_main
from mmfgm.version import __version__

from .resuming import reschedule, settings

# entries of a checkpoint, and what they are
ENTRIES = dict(meta=dict, message_hub=dict, state_dict=dict, optimizer=dict, rng=list)
PLAIN = (bool, int, float, str, type(None))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return type(value) in PLAIN  # a numpy scalar is a float by inheritance, but not plain


def encode_message_hub(state: dict[str, Any]) -> dict[str, Any]:
    """Turn a MessageHub state into tensors and plain values; runtime info of other types is left
    out."""
    scalars = {
        key: (
            *(torch.from_numpy(column.astype('float64')) for column in buffer.data),
            buffer.max_length,
        )
        for key, buffer in state['log_scalars'].items()
    }
    info = {key: value for key, value in state['runtime_info'].items() if _is_plain(value)}
    return dict(log_scalars=scalars, runtime_info=info, resumed_keys=dict(state['resumed_keys']))


def decode_message_hub(state: dict[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`encode_message_hub`.

    Raises:
        ValueError: If it is something else; other errors may come too.
    """
    for name in ('log_scalars', 'runtime_info', 'resumed_keys'):
        if not isinstance(state[name], dict) or not all(
            isinstance(key, str) for key in state[name]
        ):
            raise ValueError(f'{name} is not a dict')
    scalars = {
        key: HistoryBuffer(values.tolist(), counts.tolist(), max_length)
        for key, (values, counts, max_length) in state['log_scalars'].items()
    }
    return {**state, 'log_scalars': scalars}


def _shape(value: torch.Size | None) -> tuple[int, ...] | str:
    return 'no tensor' if value is None else tuple(value)


def check_shapes(expected: dict[str, torch.Tensor], found: dict[str, torch.Size | None]) -> None:
    """Hold the tensors of a checkpoint against the model's.

    Raises:
        UsageError: Names the first tensor that is missing, superfluous or of another shape.
    """
    for key in [*expected, *found]:
        shapes = [
            _shape(side[key].shape if side is expected else side[key]) if key in side else None
            for side in (expected, found)
        ]
        if shapes[0] != shapes[1]:
            raise UsageError(
                'the checkpoint does not fit the model of this config; first difference: tensor'
                f' {key!r} has shape {shapes[1]} in the checkpoint, and {shapes[0]} in the model'
                ' (None: missing)'
            )


def save_file(content: dict, filename: str) -> None:
    content = {**content, CHECKSUMS: checksums_of(content)}
    with whole_file(filename) as unfinished, open(unfinished, 'wb') as f:
        torch.save(content, f)


def save_directory(
    tensors: dict, extras: dict, directory: str, group: dist.ProcessGroup | None = None
) -> None:
    # all processes write into it, so its name is the same for all of them
    unfinished = f'{directory}.tmp'
    if is_main_process():
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier(group)
    try:
        dcp.save(tensors, checkpoint_id=unfinished, process_group=group)
        # every process has written one file, and reads one back
        found = all_gather_object(shard_checksums(unfinished, get_rank(), get_world_size()), group)
        if is_main_process():
            shards = {INDEX: index_checksum(unfinished)}
            for files in found:
                shards.update(files)
            save_file({**extras, SHARDS: shards}, osp.join(unfinished, EXTRAS))
            replace_folder(unfinished, directory)
    except CheckpointException as e:
        # it is no Exception, and holds those of all processes, on all of them
        first = next(iter(e.failures.values()))[0]
        raise RuntimeError(str(first)) from first
    finally:
        if is_main_process():
            shutil.rmtree(unfinished, ignore_errors=True)


class BackgroundSaver:
    """Writes sharded checkpoints in a thread, one after the other, while the training goes on.

    What is written is a copy on the CPU of what the tensors are now, made before :meth:`save`
    returns. The thread's messages go through a process group of its own. Create it on all ranks.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend='gloo')
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._filename = ''
        self._steps: list[Future] = []

    def save(self, tensors: dict, extras: dict, directory: str) -> None:
        """Begin to save; what was begun before has to be finished."""
        staged = BlockingAsyncStager().stage(tensors)
        self._filename = directory
        self._steps = [
            self._thread.submit(
                save_directory, staged, copy.deepcopy(extras), directory, self._group
            )
        ]

    def then(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the thread once the checkpoint is whole, if it becomes so."""
        saved = self._steps[0]

        def step() -> None:
            saved.result()
            function()

        self._steps.append(self._thread.submit(step))

    def finish(self) -> None:
        """Wait for it; raises what went wrong."""
        steps, self._steps = self._steps, []
        if steps:
            with _writing(self._filename):
                for step in steps:
                    step.result()


@contextmanager
def _writing(filename: str) -> Iterator[None]:
    """Around a block of all processes: the first of them says what was wrong, for all."""
    try:
        with disk_errors(osp.dirname(filename), 'go on with --resume'):
            yield
    except UsageError:
        if is_main_process():
            raise
        raise SystemExit(EXIT_USAGE) from None


@contextmanager
def _together(filename: str) -> Iterator[None]:
    """What each process reads from a checkpoint alone: if one of them cannot, all end, with one
    message that says how to go on; none waits for it."""
    error = None
    try:
        yield
    except UsageError as e:
        error = e
    errors = [e for e in all_gather_object(error) if e is not None]
    if errors:
        message = _advise(filename, errors[0])
        if not is_main_process():
            raise SystemExit(EXIT_USAGE)
        raise UsageError(message) from error


def _advise(filename: str, error: UsageError) -> str:
    """The error, and the newest whole checkpoint beside a damaged one; call on all processes.

    Which one to go on from is left to the user: to go back means to train those iterations again,
    and a disk that damaged one file may damage the next.
    """
    if not isinstance(error, DamagedError):
        return str(error)
    found = [None]
    if is_main_process():
        found = [newest_whole(osp.dirname(osp.abspath(filename)))]
    broadcast_object_list(found)
    if found[0] is None:
        return f'{error}; there is no whole checkpoint beside it'
    return (
        f'{error}; the newest whole checkpoint beside it is {found[0]!r}: resume it with --resume'
        f' {found[0]}'
    )


@contextmanager
def _entry(filename: str, name: str) -> Iterator[None]:
    """Whatever goes wrong with an entry of a checkpoint in this block is the entry's fault: it may
    hold anything where there is no checksum."""
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        raise DamagedError(
            filename, f'its {name!r} is not what a run saves ({type(e).__name__}: {e})'
        ) from e


def _require_optimizer(filename: str, there: bool) -> None:
    if not there:
        raise UsageError(
            f'{filename!r} holds no optimizer state (a best_* checkpoint does not), so training'
            ' cannot go on from it; resume from an iter_* checkpoint'
        )


class CheckpointMixin:
    """Saving, loading and resuming for a strategy; see the module's docstring."""

    sharded_checkpoints = False
    # sharded ones alone are written beside the training
    async_checkpoints = False
    _saver: BackgroundSaver | None = None

    def compare_config(self, filename: str, meta: dict) -> bool:
        """Whether the optimizers' settings and the schedules come from the config, not from the
        checkpoint; the runner, who knows the config, puts its own in place."""
        return False

    def _take_fingerprints(self, model: nn.Module) -> None:
        """Of networks that checkpoints leave out, so that a resumed run notices another teacher."""
        for name in model.pretrained:
            if name in model.networks:
                self._check_finite(model.networks[name].state_dict(), f'the {name}')
        self.fingerprints = {
            name: fingerprint(network)
            for name, network in model.networks.items()
            if name in model.pretrained
        }

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable | None = None,
    ) -> None:
        """Save the model, optimizers, schedulers and what hooks add through ``callback``; call on
        all ranks.

        With ``async_checkpoints`` it returns when all is copied, see :meth:`when_saved` and
        :meth:`finish_checkpoint`.
        """
        self.finish_checkpoint()
        extras = dict(extra_ckpt or {})
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            extras['param_schedulers'] = self.scheduler_state_dict()
        if callback is not None:
            callback(extras)
        extras['meta'] = {
            **{k: v for k, v in extras.get('meta', {}).items() if _is_plain(v)},
            'seed': self._randomness['seed'],
            'world_size': self.world_size,
            'precision': self.precision,
            'pretrained': self.fingerprints,
            'time': time.strftime('%Y%m%d_%H%M%S', time.localtime()),
            'mmengine': mmengine.__version__,
            'mmfgm': __version__,
            CHECKSUMS: True,
        }
        extras['message_hub'] = encode_message_hub(extras['message_hub'])
        # random states differ from rank to rank; everything else is the same or sharded
        extras['rng'] = all_gather_object(extras.get('rng'))
        tensors = dict(state_dict=self.model_state_dict())
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            tensors['optimizer'] = self.optim_state_dict()
        if self.async_checkpoints:
            self._saver = self._saver or BackgroundSaver()
            self._saver.save(tensors, extras, filename)
        elif self.sharded_checkpoints:
            with _writing(filename):
                save_directory(tensors, extras, filename)
            barrier()
        else:
            on_main(lambda: self._save_whole({**extras, **tensors}, filename))

    def when_saved(self, function: Callable[[], None]) -> None:
        """Have the first process call ``function`` once the checkpoint that was saved last is
        whole; call on all ranks."""
        if self._saver is None:
            on_main(function)
        elif is_main_process():
            self._saver.then(function)

    def finish_checkpoint(self) -> None:
        """Wait until the checkpoint that was saved last is whole, and what :meth:`when_saved` was
        given is done; call on all ranks."""
        if self._saver is not None:
            self._saver.finish()

    @staticmethod
    def _save_whole(content: dict, filename: str) -> None:
        with _writing(filename):
            save_file(content, filename)

    @staticmethod
    def _check_finite(state: dict, filename: str) -> None:
        """:func:`check_finite`; where processes hold shards, all of them stop at what one found."""
        error = None
        try:
            check_finite(state, filename)
        except NonFiniteInputError as e:
            error = e
        found = next(filter(None, all_gather_object(error)), None)
        if found is not None:
            raise found

    def load_checkpoint(
        self,
        filename: str,
        *,
        map_location: Any = 'cpu',
        strict: bool = True,
        revise_keys: Any = None,
        callback: Callable | None = None,
        with_optimizer: bool = False,
    ) -> dict:
        """Load the model from ``filename``; ``with_optimizer`` also reads the optimizers' states.

        Raises:
            UsageError: If the file is missing or broken, of the other kind (file or directory), or
                does not fit.
            NonFiniteInputError: If a weight in it is inf or nan.
        """
        if not osp.exists(filename):
            raise UsageError(f'checkpoint {filename!r} does not exist; name an existing one')
        sharded = osp.isdir(filename)
        if self.sharded_checkpoints != sharded and (with_optimizer or not sharded):
            kind = 'a sharded directory' if sharded else 'a single file'
            raise UsageError(
                f'checkpoint {filename!r} is {kind}, which {type(self).__name__} cannot resume; use'
                ' the strategy that wrote it'
            )
        self.logger.info(f'Load checkpoint from {filename}')

        def wanted(part: str) -> bool:
            return with_optimizer or not part.startswith('optimizer')

        with _together(filename):
            checkpoint = read_pickle(
                osp.join(filename, EXTRAS) if sharded else filename, wanted=wanted
            )
            if sharded:
                check_shards(filename, checkpoint, get_rank(), get_world_size(), wanted)
            if sharded and not self.sharded_checkpoints:
                checkpoint['state_dict'] = read_state_dict(filename)
            for name, kind in ENTRIES.items():
                if not isinstance(checkpoint.get(name, kind()), kind):
                    raise DamagedError(filename, f'its {name!r} is not a {kind.__name__}')
            if 'message_hub' in checkpoint:
                with _entry(filename, 'message_hub'):
                    checkpoint['message_hub'] = decode_message_hub(checkpoint['message_hub'])
            if self.sharded_checkpoints:
                found = sharded_shapes(filename)
        # before shapes are compared: a changed config is the better explanation
        from_config = with_optimizer and self.compare_config(filename, checkpoint.get('meta', {}))
        if self.sharded_checkpoints:
            # filled in place: every process reads only its own shards
            checkpoint['state_dict'] = self.model_state_dict()
            check_shapes(
                checkpoint['state_dict'],
                {
                    key[len(STATE_DICT) :]: shape
                    for key, shape in found.items()
                    if key.startswith(STATE_DICT)
                },
            )
            if with_optimizer:
                _require_optimizer(filename, any(key.startswith('optimizer.') for key in found))
                checkpoint['optimizer'] = self.optim_state_dict()
            with _together(filename):
                load_shards(
                    {
                        key: checkpoint[key]
                        for key in ('state_dict', 'optimizer')
                        if key in checkpoint
                    },
                    filename,
                )
        if with_optimizer:
            _require_optimizer(filename, 'optimizer' in checkpoint)
        if 'state_dict' not in checkpoint:
            raise DamagedError(filename, "it has no 'state_dict'")
        self._check_finite(checkpoint['state_dict'], filename)
        checkpoint['from_config'] = from_config
        if callback is not None:
            callback(checkpoint)
        self.load_model_state_dict(checkpoint.pop('state_dict'))
        return checkpoint

    def resume(
        self,
        filename: str,
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = 'cpu',
        callback: Callable | None = None,
    ) -> dict:
        """Load everything that an interrupted run needs to go on as if it had not stopped."""
        fresh = settings(self.optim_wrapper)
        checkpoint = self.load_checkpoint(
            filename, callback=callback, with_optimizer=resume_optimizer
        )
        if resume_optimizer:
            with _entry(filename, 'optimizer'):
                self.load_optim_state_dict(checkpoint.pop('optimizer'))
        with _entry(filename, 'meta'):
            meta = checkpoint['meta']
            for name in ('epoch', 'iter'):
                if type(meta[name]) is not int or meta[name] < 0:
                    raise TypeError(f'{name} is {str(meta[name])[:80]!r}')
            if not {'seed', 'pretrained'} <= meta.keys():
                raise KeyError('seed or pretrained')
            # MMEngine runs it, as Python; ours have none
            meta.pop('config', None)
        if checkpoint.pop('from_config'):
            self._reschedule(fresh, meta['iter'])
        elif resume_param_scheduler and hasattr(self, 'param_schedulers'):
            with _entry(filename, 'param_schedulers'):
                self.load_scheduler_state_dict(checkpoint.pop('param_schedulers'))
        saved = checkpoint['meta']['seed']
        current = self._randomness['seed']
        if saved != current:
            raise UsageError(
                f'{filename!r} comes from a run with randomness.seed={saved}, but the config says'
                f' {current}; resume with the seed it was started with'
            )
        if checkpoint['meta']['pretrained'] != self.fingerprints:
            raise UsageError(
                f'{filename!r} comes from a run with another teacher (checksums'
                f' {checkpoint["meta"]["pretrained"]}, now {self.fingerprints}); name the'
                ' teacher it was started with, or start afresh in another work dir'
            )
        return checkpoint

    def _reschedule(self, fresh: dict[str, list[dict]], iteration: int) -> None:
        saved = settings(self.optim_wrapper)
        reschedule(self.optim_wrapper, getattr(self, 'param_schedulers', None), fresh, iteration)
        for name, groups in settings(self.optim_wrapper).items():
            for i, (old, new) in enumerate(zip(saved[name], groups)):
                for key in old.keys() & new.keys():
                    if old[key] != new[key]:
                        self.logger.warning(
                            f'{name}, parameter group {i}, {key} at iteration {iteration}:'
                            f' {old[key]} -> {new[key]}'
                        )
