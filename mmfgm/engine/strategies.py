# Copyright (c) mmfgm authors.
"""How the networks of a model meet the devices: each network is wrapped on its own, in place.

The model itself stays a plain module, so the loop can call its phases; the maths never sees a
wrapper.
"""

import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from mmengine._strategy.single_device import SingleDeviceStrategy as _SingleDeviceStrategy
from mmengine.device import get_device
from mmengine.dist import all_gather_object
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmfgm.errors import UsageError
from mmfgm.models import bf16_autocast, choose_precision
from mmfgm.models.families import family_of
from mmfgm.processes import init_processes
from mmfgm.registry import STRATEGIES

from .checkpoint import CheckpointMixin, check_shapes

PRECISIONS = ('fp32', 'tf32', 'bf16', 'auto')


def _on_log_error(handler: logging.Handler, record: logging.LogRecord) -> None:
    if not isinstance(sys.exc_info()[1], OSError):
        logging.Handler.handleError(handler, record)


@STRATEGIES.register_module()
class SingleDeviceStrategy(CheckpointMixin, _SingleDeviceStrategy):
    """Every network whole on one device.

    Args:
        precision (str): ``'fp32'``; ``'tf32'`` for matrix products and convolutions of float32 on
            the tensor cores of a GPU; ``'bf16'`` for bf16 compute with float32 weights, losses
            and optimizer state; or ``'auto'`` for bf16 on GPUs and CPUs that compute in it and fp32
            on all others, which the log then names. Defaults to ``'fp32'``, in which the small
            problems, whose distances bf16 would round, are measured on any hardware.
        compile (bool): Run the networks of the training step through ``torch.compile``. Defaults to
            False.
        **kwargs: For MMEngine's ``BaseStrategy``.

    Attributes:
        precision (str): What was chosen, never ``'auto'``.
        several_backwards (bool): Whether two gradients may be taken through one forward.

    Raises:
        UsageError: If ``precision`` is unknown.
    """

    several_backwards = True

    def __init__(self, *, precision: str = 'fp32', compile: bool = False, **kwargs):
        if precision not in PRECISIONS:
            raise UsageError(
                f'strategy.precision must be one of {PRECISIONS}, but is {precision!r}'
            )
        self.precision = precision
        self.compile = compile
        super().__init__(**kwargs)
        self._choose_precision()

    def _choose_precision(self) -> None:
        """Resolve ``'auto'`` to what all processes compute in, and say when bf16 is slow here."""
        if self.precision not in ('auto', 'bf16'):
            return
        # one GPU without bf16 decides for the others: processes exchange weights or gradients
        found = all_gather_object(choose_precision(get_device()))
        chosen, why = next((each for each in found if each[0] == 'fp32'), found[0])
        if self.precision == 'auto':
            self.precision = chosen
            self.logger.info(f"strategy.precision='auto' is {chosen} here: {why}.")
        elif chosen != 'bf16':
            self.logger.warning(
                f"strategy.precision='bf16' is slow here: {why}. Set it to 'auto' or 'fp32'."
            )

    def build_logger(self, *args, **kwargs):
        """As MMEngine's, but a full disk is not told by a traceback for each line of the log: what
        must not be lost, checkpoints and results, says it once."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = partial(_on_log_error, handler)
        return logger

    # networks
    def _wrap_model(self, model: Any) -> Any:
        self._allow_tf32()
        self._take_fingerprints(model)
        device = get_device()
        model.to(device)
        if self.precision == 'bf16':
            model.autocast = bf16_autocast(torch.device(device).type)
        for name, network in model.networks.items():
            # averages only sample, at other batch sizes
            if self.compile and name not in model.ema_decays:
                network.compile()
        return model

    def _allow_tf32(self) -> None:
        # torch allows it in convolutions unless told otherwise
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            self.precision != 'fp32'
        )

    @contextmanager
    def frozen(self, networks: Iterable[nn.Module]):
        """Let gradients pass through ``networks`` without computing those of their parameters."""
        networks = list(networks)
        with ExitStack() as stack:
            # what a user froze stays frozen afterwards
            params = [p for network in networks for p in network.parameters() if p.requires_grad]
            for network in networks:
                stack.enter_context(self.unsynchronised(network))
            try:
                for p in params:
                    p.requires_grad_(False)
                yield
            finally:
                for p in params:
                    p.requires_grad_(True)

    @contextmanager
    def accumulating(self, networks: Iterable[nn.Module], last: bool):
        """Around forward and backward of a micro-batch: average gradients over processes only in
        the last."""
        with ExitStack() as stack:
            for network in () if last else networks:
                stack.enter_context(self.unsynchronised(network))
            yield

    @contextmanager
    def unsynchronised(self, network: nn.Module):
        """Keep the gradients of ``network`` on this process."""
        yield

    def _build_param_scheduler(self, scheduler, optim_wrapper, default_args) -> list:
        # MMEngine pops from default_args in place, which breaks the second optimizer
        return super()._build_param_scheduler(scheduler, optim_wrapper, dict(default_args))

    # state
    def model_state_dict(self) -> dict:
        """The model's tensors under their plain names, without networks that come from
        elsewhere."""
        skip = tuple(f'{name}.' for name in self.model.pretrained)
        state = get_model_state_dict(self.model)
        return {key: value for key, value in state.items() if not key.startswith(skip)}

    def load_model_state_dict(self, state_dict: dict, **kwargs) -> None:
        check_shapes(
            self.model_state_dict(),
            {key: getattr(value, 'shape', None) for key, value in state_dict.items()},
        )
        set_model_state_dict(self.model, state_dict, options=StateDictOptions(strict=False))


@torch.no_grad()
def _begin_alike(model: nn.Module) -> None:
    """Give all processes the weights of the first: what is initialised at random differs, as their
    random states do."""
    device = get_device()
    for tensor in chain(model.parameters(), model.buffers()):
        # not every backend takes tensors on the CPU
        first = tensor.to(device, copy=True)
        dist.broadcast(first, 0)
        # what is mapped from a file that all have read is not copied into memory
        if dist.get_rank() and not torch.equal(first.to(tensor.device), tensor):
            tensor.copy_(first)


class ProcessGroupStrategy(SingleDeviceStrategy):
    """What the strategies of several processes share."""

    def _setup_distributed(
        self, launcher: str = 'pytorch', backend: str | None = None, **kwargs
    ) -> None:
        init_processes(launcher, backend, **kwargs)

    def _wrap_model(self, model: Any) -> Any:
        _begin_alike(model)
        return super()._wrap_model(model)


@STRATEGIES.register_module()
class DDPStrategy(ProcessGroupStrategy):
    """DistributedDataParallel around each trained network; gradients are averaged over processes.

    Args:
        precision (str), compile (bool): As for :class:`SingleDeviceStrategy`.
        **kwargs: For MMEngine's ``BaseStrategy``.
    """

    def _wrap_model(self, model: Any) -> Any:
        model = super()._wrap_model(model)
        device_ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        for name in {name: None for phase in model.phases.values() for name in phase.trains}:
            wrapped = DistributedDataParallel(
                getattr(model, name),
                device_ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
            setattr(model, name, wrapped)
        return model

    @contextmanager
    def unsynchronised(self, network: nn.Module):
        with network.no_sync():
            yield


@STRATEGIES.register_module()
class FSDP2Strategy(ProcessGroupStrategy):
    """FSDP2 (``fully_shard``) of every network: parameters, gradients, optimizer state and
    averages.

    Networks with adapters share one base, whose blocks are gathered for each call of any of them;
    the adapters of a network are sharded apart from it, and gathered together.

    Checkpoints are directories with one shard per process; they resume on any number of processes.

    Args:
        block_types (Sequence[str], optional): Class names of the layers that are gathered one at a
            time, for example ``('AdaLNBlock',)``. Defaults to those of the network's family.
        shard_size (int, optional): Processes that share one copy, usually those of a machine; each
            such group holds all of it, and between groups only gradients travel, once an update
            (HSDP). Defaults to all processes.
        async_checkpoints (bool): Write checkpoints while training goes on, from a copy of a
            process's shards in the CPU's memory. Defaults to False.
        **kwargs: Those of :class:`SingleDeviceStrategy`, of which two mean more here. With
            ``precision='bf16'`` parameters are communicated in bf16 too; gradients are reduced in
            float32 and the sharded master weights stay float32. ``compile=True`` runs each of those
            layers through ``torch.compile``.

    Raises:
        UsageError: If no layer of the velocity network is of ``block_types``; small networks beside
            it need none. If the processes are no multiple of ``shard_size``.
    """

    sharded_checkpoints = True
    # blocks are resharded and gradients reduced once for each forward
    several_backwards = False

    def __init__(
        self,
        *,
        block_types: Sequence[str] = (),
        shard_size: int | None = None,
        async_checkpoints: bool = False,
        **kwargs,
    ):
        self.block_types = tuple(block_types)
        self.shard_size = shard_size
        self.async_checkpoints = async_checkpoints
        super().__init__(**kwargs)

    def _mesh(self, device: str) -> DeviceMesh:
        """Of all processes, or groups of neighbours by ``shard_size``."""
        kind, processes = torch.device(device).type, dist.get_world_size()
        if self.shard_size is None:
            return init_device_mesh(kind, (processes,))
        if self.shard_size < 1 or processes % self.shard_size:
            raise UsageError(
                f'expected strategy.shard_size to divide the number of processes, found'
                f' {self.shard_size} and {processes} processes; set it to the GPUs of one machine,'
                ' or leave it out'
            )
        # fully_shard replicates over the first dimension and shards over the second
        return init_device_mesh(
            kind,
            (processes // self.shard_size, self.shard_size),
            mesh_dim_names=('replicate', 'shard'),
        )

    def _wrap_model(self, model: Any) -> Any:
        self._allow_tf32()
        _begin_alike(model)
        self._take_fingerprints(model)
        device = get_device()
        mesh = self._mesh(device)
        # networks cast their inputs themselves, so that t stays float32; outputs feed losses in
        # float32
        compute = torch.bfloat16 if self.precision == 'bf16' else None
        block_policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
        root_policy = MixedPrecisionPolicy(
            compute, torch.float32, torch.float32, cast_forward_inputs=False
        )
        # the first network is of the velocity's architecture; heads beside it may be too small for
        # blocks
        name, network = next(iter(model.networks.items()))
        family = family_of(network)
        block_types = self.block_types or (family.block_types if family else ())
        blocks = {
            name: [m for m in network.modules() if type(m).__name__ in block_types]
            for name, network in model.networks.items()
        }
        if not blocks[name]:
            inside = sorted({type(m).__name__ for m in network.modules()})
            raise UsageError(
                f'strategy.block_types={block_types} matches no layer of network {name!r}; it'
                f' has layers of types {inside}'
            )
        for name, network in model.networks.items():
            for block in blocks[name]:
                if self.compile:
                    block.compile()
                fully_shard(block, mesh=mesh, mp_policy=block_policy, reshard_after_forward=True)
            # the root is resharded too: averages and optimizers must see shards at any time
            fully_shard(network, mesh=mesh, mp_policy=root_policy, reshard_after_forward=True)
        return model.to(device)

    @contextmanager
    def unsynchronised(self, network: nn.Module):
        # within a group gradients are reduced always, so that no process holds them whole
        network.set_requires_all_reduce(False)
        try:
            yield
        finally:
            network.set_requires_all_reduce(True)

    def optim_state_dict(self) -> dict[str, dict]:
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        return {
            name: get_optimizer_state_dict(
                getattr(self.model, name), wrapper.optimizer, options=flat
            )
            for name, wrapper in self.optim_wrapper.items()
        }

    def load_optim_state_dict(self, state_dict: dict[str, dict]) -> None:
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        for name, wrapper in self.optim_wrapper.items():
            set_optimizer_state_dict(
                getattr(self.model, name),
                wrapper.optimizer,
                optim_state_dict=state_dict[name],
                options=flat,
            )


def default_strategy(launcher: str) -> str:
    """The strategy a config gets when it names none: one device without a launcher, DDP with
    one."""
    return 'mmfgm.SingleDeviceStrategy' if launcher == 'none' else 'mmfgm.DDPStrategy'


__all__: list[str] = [
    'DDPStrategy',
    'FSDP2Strategy',
    'SingleDeviceStrategy',
    'default_strategy',
]
