# Copyright (c) mmfgm authors.
"""One iteration of a config at full size, without values: what it costs, and what would fail."""

import math
import os.path as osp
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from torch.distributed.fsdp import FSDPModule

from mmfgm.engine import FlowRunner, FSDP2Strategy
from mmfgm.errors import UsageError
from mmfgm.models import FlowModel, has_adapters

from .counting import Kind, Memory, Traffic, Work, sizes_of
from .gpus import EFFICIENCY, GIB, GPU, gpu_named
from .pretending import pretended_run

TORCH = osp.dirname(torch.__file__)
HERE = osp.dirname(__file__)


@dataclass
class PhaseCost:
    """What the updates of a phase cost one GPU in an iteration, accumulation included.

    Args:
        updates (int): Of the phase in an iteration.
        tflop (float): Arithmetic of matrix products, convolutions and attention.
        peak_bytes (dict[str, int]): By kind, when their sum is highest.
        traffic_bytes (dict[str, int]): By collective, see :class:`Traffic`.
        messages (int): Collectives.
        compute_seconds (float), link_seconds (float): Rooflines; 0 without a GPU.
    """

    updates: int = 0
    tflop: float = 0.0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    traffic_bytes: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    compute_seconds: float = 0.0
    link_seconds: float = 0.0

    @property
    def peak(self) -> int:
        return sum(self.peak_bytes.values())

    @property
    def seconds(self) -> float:
        """Where communication hides behind arithmetic, or the reverse."""
        return max(self.compute_seconds, self.link_seconds)


@dataclass
class Rehearsal:
    """What :func:`rehearse` found.

    Args:
        strategy (str), precision (str): Of the run.
        gpus (int): One process each.
        gpu (str, optional): Its name.
        batch_size (int): Samples of one GPU in a micro-batch.
        accumulation (int): Micro-batches of an update.
        iterations (int): To the end of the schedule.
        parameters (dict[str, int]): Numbers in each network, whole.
        phases (dict[str, PhaseCost]): By name.
        advice (list[str]): What to change if it does not fit.
    """

    strategy: str
    precision: str
    gpus: int
    gpu: str | None
    batch_size: int
    accumulation: int
    iterations: int
    parameters: dict[str, int]
    phases: dict[str, PhaseCost]
    advice: list[str] = field(default_factory=list)

    @property
    def peak(self) -> PhaseCost:
        """The phase that takes most memory."""
        return max(self.phases.values(), key=lambda cost: cost.peak)

    @property
    def fits(self) -> bool | None:
        """None without a GPU."""
        return None if self.gpu is None else self.peak.peak <= gpu_named(self.gpu).usable_bytes

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return sum(cost.seconds for cost in self.phases.values())

    @property
    def days(self) -> float:
        """To the end of the schedule."""
        return self.seconds * self.iterations / 86400

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.gpus

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found.update(peak_bytes=self.peak.peak, fits=self.fits)
        if self.gpu is not None:
            found.update(
                seconds=self.seconds, days=self.days, gpu_hours=self.gpu_hours, assumed=EFFICIENCY
            )
        return found


def rehearse(cfg: Config, gpus: int, gpu: str | None = None, per_machine: int = 8) -> Rehearsal:
    """Run one iteration of a config without values, as the first of ``gpus`` processes.

    It is an iteration after the first: optimizers have their state, and with accumulation the
    micro-batch that is run is the last of an update, which finds the gradients of the others.

    Raises:
        UsageError: For an unknown GPU, a config that cannot be built, and whatever a real run would
            stumble over, with its place.
    """
    sheet = None if gpu is None else gpu_named(gpu)
    for option, number in (('--gpus', gpus), ('--per-machine', per_machine)):
        if number < 1:
            raise UsageError(f'expected {option} to be at least 1, found {number}')
    accumulation = cfg.train_cfg.get('accumulation', 1)
    with explained(None, 'building the run'), pretended_run(cfg, gpus) as runner:
        model, strategy = runner.model, runner.strategy
        found = Rehearsal(
            strategy=type(strategy).__name__,
            precision=strategy.precision,
            gpus=gpus,
            gpu=gpu,
            batch_size=runner.train_loop.dataloader.batch_size,
            accumulation=accumulation,
            iterations=runner.train_loop.max_iters,
            parameters={
                name: sum(p.numel() for p in network.parameters())
                for name, network in model.networks.items()
            },
            phases=_run(runner, sheet, accumulation, per_machine),
        )
    if found.fits is False:
        found.advice = _advice(found, model, sheet)
    return found


def _run(
    runner: FlowRunner, gpu: GPU | None, accumulation: int, per_machine: int
) -> dict[str, PhaseCost]:
    """Costs of the phases of one iteration."""
    model, loop, strategy = runner.model, runner.train_loop, runner.strategy
    optimizers = [wrapper.optimizer for wrapper in runner.optim_wrapper.values()]
    averages = set(model.ema_decays)
    _first_step(runner)
    memory = Memory()
    memory.know(model.networks, averages, optimizers)
    phases: dict[str, PhaseCost] = {}
    moments: dict[str, list[tuple[int, int]]] = {}
    update, update_jointly, prepare = loop._update, loop._update_jointly, loop._prepare

    @contextmanager
    def counting(phase: str) -> Iterator[None]:
        cost = phases.setdefault(phase, PhaseCost())
        start = memory.mark()
        with (
            explained(model, f'phase {phase!r}'),
            Traffic(per_machine) as traffic,
            Work(gpu, strategy.precision == 'tf32') as work,
        ):
            yield
        moments.setdefault(phase, []).append((start, memory.mark()))
        cost.tflop += work.flops * accumulation / 1e12
        cost.compute_seconds += work.seconds * accumulation
        # gathered and scattered in each micro-batch; summed over copies of the weights in the last
        messages = Counter(
            {
                message: times * (1 if message.name == 'all_reduce' else accumulation)
                for message, times in traffic.messages.items()
            }
        )
        cost.traffic_bytes = dict(Counter(cost.traffic_bytes) + sizes_of(messages))
        cost.messages += messages.total()
        if gpu is not None:
            cost.link_seconds += sum(
                times * message.seconds(gpu) for message, times in messages.items()
            )

    def counted(phase: str, shared: dict | None) -> None:
        if accumulation > 1:
            _earlier_gradients(model, phase)
        with counting(phase):
            loop._prepare = prepare
            try:
                update(phase, shared)
            except RuntimeError:
                # says why, where it is the reason
                _check_reduction(model, strategy)
                raise
            finally:
                loop._prepare = shared_by_phases
        phases[phase].updates += 1

    def counted_jointly() -> int:
        """What phases do together is one of its own."""
        if accumulation > 1:
            for phase in model.phases:
                _earlier_gradients(model, phase)
        together = ' and '.join(dict.fromkeys(loop.schedule))
        with counting(together):
            loop._prepare = prepare
            updates = update_jointly()
            loop._prepare = shared_by_phases
        phases[together].updates += 1
        return updates

    def shared_by_phases(differentiable: bool) -> dict:
        """Samples made before the phases that share them count as the first one's."""
        with counting(loop.schedule[0]):
            return prepare(differentiable)

    loop._prepare, loop._update_jointly = shared_by_phases, counted_jointly
    loop._update = counted

    def before_step(name: str, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        if not any(p.grad is not None for group in optimizer.param_groups for p in group['params']):
            raise UsageError(
                f'expected network {name!r} to have gradients when its optimizer steps, found none:'
                ' all of its parameters are frozen, or the loss does not depend on them'
            )
        memory.know(model.networks, averages, optimizers)

    handles = [
        wrapper.optimizer.register_step_pre_hook(partial(before_step, name))
        for name, wrapper in runner.optim_wrapper.items()
    ]
    # the last iteration, so that what begins later is there
    loop._iter = loop.max_iters - 1
    with memory:
        loop.run_iter()
    for handle in handles:
        handle.remove()
    memory.know(model.networks, averages, optimizers)
    for name, spans in moments.items():
        peaks = [memory.peak(*span) for span in spans]
        phases[name].peak_bytes = max(peaks, key=lambda kinds: sum(kinds.values()))
    _check_reduction(model, strategy)
    return phases


def _first_step(runner: FlowRunner) -> None:
    """Give optimizers the state that a step makes."""
    for wrapper in runner.optim_wrapper.values():
        for group in wrapper.optimizer.param_groups:
            for p in group['params']:
                p.grad = torch.zeros_like(p)
        wrapper.optimizer.step()
        wrapper.optimizer.zero_grad()


def _earlier_gradients(model: FlowModel, phase: str) -> None:
    for name in model.phases[phase].trains:
        for p in getattr(model, name).parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)


def _check_reduction(model: FlowModel, strategy: Any) -> None:
    """FSDP2 settles how gradients of a module are reduced when it first runs; older versions from
    what is frozen then, which would leave them in bf16 (pytorch#186998)."""
    if not isinstance(strategy, FSDP2Strategy):
        return
    for phase, spec in model.phases.items():
        for name in spec.trains:
            for path, module in getattr(model, name).named_modules():
                group = (
                    isinstance(module, FSDPModule) and module._get_fsdp_state()._fsdp_param_group
                )
                # a group that has not run yet has settled nothing
                if not hasattr(group, '_reduce_dtype') or not any(
                    p.sharded_param.requires_grad for p in group.fsdp_params
                ):
                    continue
                wanted, found = group.mp_policy.reduce_dtype, group._reduce_dtype
                if wanted not in (found, group._orig_dtype):
                    raise UsageError(
                        f'expected gradients of {name}{path and "." + path} to be reduced in'
                        f' {wanted}, found {found}: it was frozen when it first ran, which FSDP2'
                        f' does not forget, and phase {phase!r} trains it; let the phase that'
                        ' trains it run first'
                    )


@contextmanager
def explained(model: FlowModel | None, where: str) -> Iterator[None]:
    """Turn an error of a real run into one message with its place: the phase, the network's layer,
    and the last line of code that is not torch's."""
    try:
        yield
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError, KeyError) as e:
        names = {id(module): name for name, module in model.named_modules()} if model else {}
        layer = line = ''
        for frame, number in traceback.walk_tb(e.__traceback__):
            layer = names.get(id(frame.f_locals.get('self')), '') or layer
            file = frame.f_code.co_filename
            if not file.startswith((TORCH, HERE, '<')):
                line = f'{file}:{number}, {frame.f_code.co_name}'
        raise UsageError(
            f'a run would fail in {where}{layer and f", layer {layer}"}: {type(e).__name__}:'
            f' {str(e).strip()[:400]} ({line})'
        ) from e


def _advice(found: Rehearsal, model: FlowModel, gpu: GPU) -> list[str]:
    """What to change, the cheapest first."""
    kinds = found.peak.peak_bytes
    activations = kinds[Kind.ACTIVATIONS.value]
    lasting = found.peak.peak - activations - kinds[Kind.GATHERED.value]
    room = gpu.usable_bytes - (found.peak.peak - activations)
    advice = []
    recomputed = any(
        getattr(module, 'gradient_checkpointing', False)
        for network in model.networks.values()
        for module in network.modules()
    )
    can = any(hasattr(module, 'gradient_checkpointing') for module in model.modules())
    if can and not recomputed and room > 0:
        # the fastest that fits: a block that is not computed again keeps its activations
        share = min(math.ceil(4 * (1 - room / activations)) / 4, 1.0) if activations else 1.0
        advice.append(
            f'recomputation: model.network.checkpointing={share if share < 1 else True} computes'
            f' {share:.0%} of the blocks again'
        )
    batch_size = math.floor(found.batch_size * room / activations) if activations else 0
    if 1 <= batch_size < found.batch_size:
        advice.append(
            f'batch: train_dataloader.batch_size={batch_size} with train_cfg.accumulation='
            f'{math.ceil(found.accumulation * found.batch_size / batch_size)}'
        )
    if found.strategy == 'FSDP2Strategy' and room < activations:
        needed = lasting * found.gpus / max(gpu.usable_bytes - found.peak.peak + lasting, 1)
        if needed < 1024:
            advice.append(f'GPUs: about {math.ceil(needed)}, over which the states are sharded')
    elif found.strategy != 'FSDP2Strategy' and lasting > gpu.usable_bytes / 2:
        advice.append('GPUs: shard the states over several with strategy.type=FSDP2Strategy')
    if lasting > gpu.usable_bytes / 2 and not any(
        has_adapters(network) for network in model.networks.values()
    ):
        advice.append('LoRA: model.lora=dict(rank=64, ...) trains adapters of one shared network')
    return advice or ['a GPU with more memory']


def report(found: Rehearsal) -> str:
    """What was found, as text."""
    kinds = [kind.value for kind in Kind]
    rows = [('', 'TFLOP', *(f'{kind} GiB' for kind in kinds), 'peak GiB')]
    for name, cost in found.phases.items():
        rows.append(
            (
                f'{name} x {cost.updates}',
                f'{cost.tflop:.4g}',
                *(f'{cost.peak_bytes[kind] / GIB:.3f}' for kind in kinds),
                f'{cost.peak / GIB:.3f}',
            )
        )
    lines = [
        f'{found.strategy}, {found.precision}, {found.gpus} GPU(s), batch {found.batch_size} x'
        f' accumulation {found.accumulation} x GPUs ='
        f' {found.batch_size * found.accumulation * found.gpus}',
        ', '.join(f'{name} {n / 1e6:.1f} M' for name, n in found.parameters.items()),
        '',
        *_aligned(rows),
        '',
        "TFLOP of one GPU in an iteration; memory of one GPU at the phase's peak.",
    ]
    for name, cost in found.phases.items():
        sent = ', '.join(f'{op} {size / GIB:.3f} GiB' for op, size in cost.traffic_bytes.items())
        lines.append(
            f'{name} communicates {sent or "nothing"} in an iteration'
            f'{f", by {cost.messages} messages" if sent else ""}.'
        )
    if found.gpu is None:
        return '\n'.join(lines)
    gpu = gpu_named(found.gpu)
    assumed = ', '.join(f'{name} {part:.0%}' for name, part in EFFICIENCY.items())
    lines += [
        '',
        f'On {found.gpu} ({gpu.link}; between machines {gpu.network}), if of its data sheet it'
        f' reaches {assumed}:',
    ]
    for name, cost in found.phases.items():
        lines.append(
            f'{name}: {cost.compute_seconds:.3f} s of arithmetic and memory, beside'
            f' {cost.link_seconds:.3f} s of communication'
        )
    lines += [
        f'{found.seconds:.3f} s an iteration, {found.iterations} iterations: {found.days:.2f} days,'
        f' {found.gpu_hours:.0f} GPU-hours',
        f'{found.peak.peak / GIB:.1f} GiB {"fit" if found.fits else "do NOT fit"} into the'
        f' {gpu.usable_bytes / GIB:.1f} GiB that its context and a reserve leave of {gpu.gib:.1f}',
    ]
    lines += [f'- {each}' for each in found.advice]
    return '\n'.join(lines)


COLUMNS = (
    'recipe',
    'strategy',
    'GPUs x batch x accumulation',
    'TFLOP',
    *(kind.value for kind in Kind),
    'peak, GiB',
    'communication, GiB',
    'days',
    'fits',
)


def markdown_row(name: str, found: Rehearsal) -> str:
    """A line of a table with :data:`COLUMNS`: arithmetic and communication of an iteration, memory
    of the phase that takes most, all of one GPU."""
    traffic = sum((Counter(cost.traffic_bytes) for cost in found.phases.values()), Counter())
    sent = ', '.join(
        f'{op.replace("_", "-")} {size / GIB:.3g}' for op, size in traffic.items() if size
    )
    cells = (
        f'`{name}`',
        f'{found.strategy.removesuffix("Strategy")}, {found.precision}',
        f'{found.gpus} x {found.batch_size} x {found.accumulation}',
        f'{sum(cost.tflop for cost in found.phases.values()):.4g}',
        *(f'{found.peak.peak_bytes[kind.value] / GIB:.3g}' for kind in Kind),
        f'{found.peak.peak / GIB:.3g}',
        sent or 'none',
        *(('', '') if found.gpu is None else (f'{found.days:.2g}', 'yes' if found.fits else 'no')),
    )
    return f'| {" | ".join(cells)} |'


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
