# Copyright (c) mmfgm authors.
"""A training run without values, data, weights or GPUs: what is built is what a run builds, and
what needs values is left out or pretended."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from mmfgm.apis.config import building
from mmfgm.engine import FlowRunner
from mmfgm.errors import UsageError
from mmfgm.models import FlowModel

from .shapes import build_without_weights, training_batch

aten = torch.ops.aten


class _Endless:
    """Stands in for the training data, of which a rehearsal needs the shapes only."""

    metainfo: dict[str, Any] = {}

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict[str, int]:
        return dict(idx=index)


class _SoundValues(TorchDispatchMode):
    """Answers code that asks a tensor without values for one: True, as checks of a sound run are
    answered; how many places there are, where a mask's are counted (no padding); or 1."""

    SAME = (aten.unbind.int, aten.select.int, aten.max.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        source = args[0] if args and isinstance(args[0], FakeTensor) else None
        places = getattr(source, 'places', None)
        if func is aten._local_scalar_dense.default and source is not None:
            if source.dtype is torch.bool:
                return True
            if places is not None:
                return places
            return 1.0 if source.dtype.is_floating_point else 1
        out = func(*args, **(kwargs or {}))
        if func is aten.sum.dim_IntList and not source.dtype.is_floating_point:
            out.places = source.numel() // max(out.numel(), 1)
        elif places is not None and func in self.SAME:
            for counted in tree_leaves(out):
                counted.places = places
        return out


@contextmanager
def pretended_processes(number: int) -> Iterator[None]:
    """This process as the first of ``number``; what it sends arrives nowhere."""
    if dist.is_initialized():
        raise UsageError(
            'a rehearsal needs a process without a process group; run it in one of its own'
        )
    if number > 1:
        dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def without_values() -> Iterator[None]:
    """Replace what reads values or asks for a device, in the strategies and the loop."""

    def outside(*args, **kwargs):
        # a mesh is made of numbers
        with unset_fake_temporarily():
            return init_device_mesh(*args, **kwargs)

    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def uncounted(*args, **kwargs):
        # DTensor works out shapes by running operations on tensors of the whole size
        with _disable_current_modes():
            return propagate(*args, **kwargs)

    def bf16(strategy) -> None:
        # GPUs that a rehearsal is about compute in bf16
        strategy.precision = 'bf16' if strategy.precision == 'auto' else strategy.precision

    single = 'strategies.SingleDeviceStrategy'
    with ExitStack() as stack:
        for name, new in {
            'strategies.init_device_mesh': outside,
            'strategies.get_device': lambda: 'cpu',
            'strategies.DistributedDataParallel': Replicated,
            f'{single}._choose_precision': bf16,
            f'{single}._take_fingerprints': lambda strategy, model: None,
            'loops.check_finite_batch': lambda batch, dataset: None,
        }.items():
            stack.enter_context(mock.patch(f'mmfgm.engine.{name}', new))
        name = '_propagate_tensor_meta_non_cached'
        stack.enter_context(mock.patch.object(ShardingPropagator, name, uncounted))
        yield


class Replicated(nn.Module):
    """DistributedDataParallel without values, which its C++ needs: gradients lie in buckets that
    stay, and are summed over processes at the end of a backward pass, here each on its own."""

    def __init__(self, module: nn.Module, device_ids: Any, **kwargs: Any):
        super().__init__()
        self.module = module
        self.synchronised = True
        self._queued = False
        self.buckets = {p: torch.empty_like(p) for p in module.parameters() if p.requires_grad}
        for p in self.buckets:
            p.register_post_accumulate_grad_hook(self._into_bucket)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('module'), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.synchronised = self.synchronised, False
        try:
            yield
        finally:
            self.synchronised = before

    def _into_bucket(self, p: Tensor) -> None:
        p.grad = self.buckets[p].copy_(p.grad)
        if self.synchronised and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    def _reduce(self) -> None:
        self._queued = False
        for bucket in self.buckets.values():
            dist.all_reduce(bucket)


def _to_fake(model: FlowModel) -> None:
    """Replace tensors on the meta device by fake ones; networks with adapters share some."""
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    replaced[id(old)] = old, new
                tensors[name] = replaced[id(old)][1]
        # tables that are neither, such as those of rotary embeddings, one or a list
        for name, old in list(vars(module).items()):
            if isinstance(old, Tensor) or (isinstance(old, list) and tree_leaves(old)):
                new = tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype), old)
                setattr(module, name, new)


def bare_runner(cfg: Config, model: FlowModel, work_dir: str, launcher: str) -> FlowRunner:
    """The config's runner around a model, with endless data of one batch (:func:`feed`), and of
    hooks the averages' alone.

    Raises:
        UsageError: If the config cannot be built.
    """
    cfg = cfg.copy()
    ema = (cfg.get('default_hooks') or {}).get('ema')
    cfg.merge_from_dict(
        dict(
            work_dir=work_dir,
            # what MMEngine keeps by name is not that of a rehearsal in the same second
            experiment_name=Path(work_dir).name,
            launcher=launcher,
            log_level='ERROR',
            load_from=None,
            resume=False,
        )
    )
    # what else hooks do, they do with values
    for key in ('custom_hooks', 'evaluations', 'visualizer'):
        cfg[key] = None
    cfg.default_hooks = dict.fromkeys(
        ('timer', 'logger', 'param_scheduler', 'checkpoint', 'sampler_seed', 'runtime_info')
    )
    if ema:
        cfg.default_hooks.ema = ema
    runner = building(lambda: FlowRunner.from_cfg(cfg))
    runner._train_dataloader['dataset'] = _Endless()
    runner._train_dataloader['num_workers'] = 0
    runner.model = model
    return runner


def feed(runner: FlowRunner, cfg: Config) -> None:
    """Give a prepared runner's loop the same batch for ever, of the shapes of the config's data."""
    loop = runner.train_loop
    batch = training_batch(cfg, runner.model, loop.dataloader.batch_size)
    loop._batches = itertools.repeat(batch)
    runner.model.train()


@contextmanager
def pretended_run(cfg: Config, gpus: int) -> Iterator[FlowRunner]:
    """The config's runner on tensors without values, as the first of ``gpus`` processes, ready for
    an iteration (``runner.train_loop.run_iter()``) of one micro-batch an update.

    Raises:
        UsageError: If the config cannot be built, or needs values to be.
    """
    init_default_scope('mmfgm')
    with (
        tempfile.TemporaryDirectory() as work_dir,
        pretended_processes(gpus),
        without_values(),
    ):
        model = build_without_weights(cfg)
        runner = bare_runner(cfg, model, work_dir, 'none' if gpus == 1 else 'pytorch')
        with FakeTensorMode(), _SoundValues():
            _to_fake(model)
            object.__setattr__(model, 'to', lambda *args, **kwargs: model)
            runner.prepare()
            runner.train_loop.accumulation = 1
            feed(runner, cfg)
            yield runner
