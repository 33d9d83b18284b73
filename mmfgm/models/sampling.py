# Copyright (c) mmfgm authors.
"""What to draw, and the only way to draw it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import NonFiniteError, UsageError
from mmfgm.flow import ClassifierFreeGuidance, edm_times, shifted_times, uniform_times
from mmfgm.processes import is_finite, local
from mmfgm.registry import FUNCTIONS

from .families import DiffusersFamily, family_of
from .lora import without_adapters

Conditions = dict[str, Tensor]
# of a CPU that multiplies matrices in bf16; any other converts each number, many times slower
BF16_FLAGS = ('avx512_bf16', 'amx_bf16')

SPACINGS = dict(uniform=uniform_times, edm=edm_times)
# times and guidance are those of the network's family
PIPELINE = 'pipeline'


@dataclass(frozen=True)
class Sampling:
    """How to turn noise into samples: which network, and for an ODE which solver and how many
    evaluations.

    Args:
        network (str): Name of a network of the model, for example ``generator_ema`` or ``teacher``.
        nfe (int): Network evaluations; a generator takes 1 or, of few steps, up to one for each of
            its times.
        solver (str): A solver of :mod:`mmfgm.flow.ode`.
        shift (float, optional): The time grid of diffusers' scheduler of this shift, which SD3's
            pipeline uses (3 there). Defaults to evenly spaced times.
        guidance (float, optional): Scale of classifier-free guidance; one batched call, so one
            evaluation.
        spacing (str): Of the times: ``'uniform'``; ``'edm'`` for those of EDM's sampler, which
            its published networks are sampled at; or ``'pipeline'`` for those of the stock
            pipeline of the network's family, with that pipeline's form of guidance. Defaults to
            ``'uniform'``.
        guidance_channels (int, optional): Guide the first so many channels only, see
            :class:`~mmfgm.flow.ClassifierFreeGuidance`. Defaults to all.
        deterministic (bool): Of a generator of few steps: the noise between calls is the one that
            the estimate implies, instead of fresh noise of the item's own seed. Defaults to False.

    Raises:
        UsageError: If the solver cannot spend exactly ``nfe`` evaluations, there is no such
            spacing, or a shift is asked of another than the uniform one.
    """

    network: str
    nfe: int = 1
    solver: str = 'euler'
    shift: float | None = None
    guidance: float | None = None
    spacing: str = 'uniform'
    guidance_channels: int | None = None
    deterministic: bool = False

    def times(self, network: nn.Module, device) -> Tensor:
        """The solver's time grid for a network, from 1 to 0."""
        steps = self.nfe // FUNCTIONS.get(self.solver).evaluations_per_step
        if self.spacing == PIPELINE:
            network = without_adapters(network)
            pretrained = getattr(network, 'pretrained', None)
            return _family(network).stock_times(steps, network, pretrained).to(device)
        if self.shift is not None:
            return shifted_times(steps, self.shift, device)
        return SPACINGS[self.spacing](steps, device)

    def but(self, **asked: Any) -> 'Sampling':
        """This one with what a user asked for; a shift alone is of uniform times."""
        if 'shift' in asked:
            asked.setdefault('spacing', 'uniform')
        return replace(self, **asked)

    def __post_init__(self):
        solver = FUNCTIONS.get(self.solver)
        if solver is None:
            raise UsageError(f'there is no ODE solver {self.solver!r}; use euler or heun')
        if self.nfe < 1 or self.nfe % solver.evaluations_per_step:
            raise UsageError(
                f'{self.solver} spends {solver.evaluations_per_step} evaluations a step, so its NFE'
                f' must be a positive multiple of that, but got nfe={self.nfe}'
            )
        if self.spacing not in (*SPACINGS, PIPELINE):
            raise UsageError(
                f'there is no spacing of times {self.spacing!r}; use'
                f' {" or ".join((*SPACINGS, PIPELINE))}'
            )
        if self.shift is not None and self.spacing != 'uniform':
            raise UsageError(
                f'shift={self.shift} moves uniform times, but spacing={self.spacing!r}; set'
                " spacing='uniform', or shift=None"
            )


def _family(network: nn.Module) -> DiffusersFamily:
    """The family of a network over a stock pipeline, or a UsageError."""
    network = without_adapters(network)
    family = family_of(network)
    if not isinstance(family, DiffusersFamily):
        raise UsageError(
            f'expected a network of a family for spacing={PIPELINE!r}, found'
            f' {type(network).__name__}, which has no stock pipeline; use'
            f' {" or ".join(SPACINGS)}'
        )
    return family


def bf16_autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts in which networks compute in bf16, with float32 weights and outputs.

    Casts of weights are not kept: one that was made where no gradient is needed would be used
    where one is.
    """
    return partial(torch.autocast, device_type, torch.bfloat16, cache_enabled=False)


def choose_precision(device: str | torch.device) -> tuple[str, str]:
    """What ``precision='auto'`` means on a device.

    Args:
        device (str | torch.device): Of type ``'cuda'`` or ``'cpu'``; any other computes in fp32.

    Returns:
        tuple[str, str]: ``'bf16'`` where the hardware computes in it, else ``'fp32'``; and why, for
            the log.
    """
    kind = torch.device(device).type
    if kind == 'cuda':
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return 'bf16', f'{name} computes in it'
        return 'fp32', f'{name} has no bf16'
    if kind != 'cpu':
        return 'fp32', f'of {kind} it is not known whether it computes in bf16'
    # older versions of torch cannot be asked
    flags = getattr(torch.cpu, 'get_capabilities', dict)()
    found = [flag for flag in BF16_FLAGS if flags.get(flag)]
    if found:
        return 'bf16', f'this CPU has {" and ".join(found)}'
    return 'fp32', f'this CPU has neither {" nor ".join(BF16_FLAGS)}'


def check_labels(cond: Conditions, num_classes: int | None) -> None:
    """Compare labels with the network's classes; a label outside of them would mean "no class".

    Call it while labels are on the CPU, where looking is free.

    Args:
        cond (dict[str, Tensor]): Conditions of a batch.
        num_classes (int, optional): 0 for an unconditional network; None if the network does not
            say, so that its conditions are its own business.

    Raises:
        UsageError: If there are labels and no classes or the reverse, or a label is out of range.
    """
    labels = cond.get('labels')
    if num_classes is None or (labels is None and not num_classes):
        return
    if labels is None or not num_classes:
        raise UsageError(
            f'the network has {num_classes} classes, but the dataset gives'
            f' {"no labels" if labels is None else "labels"}; make the two agree'
        )
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UsageError(
            f'labels must lie in [0, {num_classes - 1}], but the dataset gives'
            f' {int(labels.min())} to {int(labels.max())}'
        )


@dataclass
class Sampler:
    """Draws samples with the networks of a model.

    Args:
        networks (Mapping[str, nn.Module]): By name.
        event_shape (tuple[int, ...]): Of one sample.
        generators (Mapping[str, int]): Networks that map noise to samples, and the most calls that
            a sample of each takes; all others are integrated.
        num_classes (int, optional): See :func:`check_labels`.
        null (callable, optional): Maps conditions to "no condition", for guidance.
        decoder (callable, optional): Turns samples into images.
        preprocess (callable): Moves a batch to the device.
        autocast (callable): Makes the context in which networks run.
        name (str): Of the model, for messages.
    """

    networks: Mapping[str, nn.Module]
    event_shape: tuple[int, ...]
    generators: Mapping[str, int] = field(default_factory=dict)
    num_classes: int | None = None
    null: Callable[[Conditions], Conditions] | None = None
    decoder: Callable[[Tensor], Tensor] | None = None
    preprocess: Callable[[dict[str, Any]], dict[str, Any]] = dict
    autocast: Callable[[], AbstractContextManager] = nullcontext
    name: str = 'the model'

    def check(self, sampling: Sampling) -> None:
        """Compare a sampling with the networks, before any sample is drawn.

        Raises:
            UsageError: If there is no such network, a generator takes no ``nfe`` calls, or the
                network has no stock pipeline to be sampled as.
        """
        if sampling.network not in self.networks:
            raise UsageError(
                f'{self.name} has no network {sampling.network!r}; choose from'
                f' {list(self.networks)}'
            )
        most = self.generators.get(sampling.network)
        if most is not None and sampling.nfe > most:
            raise UsageError(
                f'{sampling.network} is a generator of {most} step{"s" if most > 1 else ""}: its'
                f' NFE is 1{f" to {most}" if most > 1 else ""}, not {sampling.nfe}'
            )
        if sampling.deterministic and (most or 1) < 2:
            raise UsageError(
                f'expected deterministic=True of a generator of few steps, found'
                f' {sampling.network}, which draws no noise between calls; leave it out'
            )
        if sampling.spacing == PIPELINE and most is None:
            _family(self.networks[sampling.network])
        if sampling.guidance is not None and (self.null is None or most is not None):
            raise UsageError(
                f'guidance={sampling.guidance} of {sampling.network} needs a network that is'
                ' integrated, and a model that knows "no condition": set model.guidance (FGM) or'
                ' model.null_condition (FlowMatching)'
            )

    def noise(self, seeds) -> Tensor:
        """Standard normal noise ``(N, *event)``; each row depends on its own seed alone.

        It is drawn on the CPU, so that the same seeds give the same images on every device.
        """
        return self.noises(seeds, 1)[0]

    def noises(self, seeds, count: int) -> Tensor:
        """``count`` draws of :meth:`noise`, ``(count, N, *event)``; more of them begin with the
        same."""
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(int(seed))
            draws = [torch.randn(self.event_shape, generator=generator) for _ in range(count)]
            rows.append(torch.stack(draws))
        return torch.stack(rows, dim=1)

    @torch.no_grad()
    def sample(self, batch: dict[str, Any], sampling: Sampling) -> Tensor:
        """Generate one sample for each item of a batch ``dict(idx, seed, [cond])``.

        Returns:
            Tensor: ``(N, *event)``, float32, on the model's device; images in [-1, 1] up to
                overshoot. With a decoder, the images.

        Raises:
            UsageError: See :meth:`check` and :func:`check_labels`.
            NonFiniteError: If a sample holds inf or nan, which pictures would show as black.
        """
        self.check(sampling)
        check_labels(batch.get('cond', {}), self.num_classes)
        stochastic = sampling.network in self.generators and not sampling.deterministic
        noises = self.noises(batch['seed'], sampling.nfe if stochastic else 1)
        inputs = self.preprocess({**batch, 'noises': noises})
        cond = inputs.get('cond', {})
        network = self.networks[sampling.network]
        training = network.training
        network.eval()
        try:
            with self.autocast():
                samples = self._draw(network, inputs['noises'], cond, sampling)
        finally:
            network.train(training)
        self._check_finite(samples, 'made', batch, cond, sampling)
        if self.decoder is None:
            return samples
        images = self.decoder(samples)
        self._check_finite(images, 'was decoded to', batch, cond, sampling)
        return images

    def _check_finite(
        self, samples: Tensor, did: str, batch: dict, cond: Conditions, sampling: Sampling
    ) -> None:
        """Stop at samples with inf or nan, and say what they come from."""
        if is_finite(samples):
            return
        network = self.networks[sampling.network]
        rows = local(samples).flatten(1).isfinite().all(1).logical_not().nonzero().flatten()
        weights = [name for name, value in network.state_dict().items() if not is_finite(value)]
        given = [name for name, value in cond.items() if not is_finite(value)]
        if weights:
            why = (
                f'Its weights hold them ({weights[0]!r}): take an earlier checkpoint, or download'
                ' the file again'
            )
        elif given:
            why = f'Its conditions hold them ({given[0]}): make the cache of the prompts again'
        else:
            why = (
                'Its weights and conditions do not, so a value became too large on the way: compute'
                ' with precision fp32, take more NFE or less guidance, or an earlier checkpoint'
            )
        seeds = [int(batch['seed'][int(row)]) for row in rows[:8]]
        raise NonFiniteError(
            f'{sampling.network} of {self.name}, {sampling.nfe} NFE, {did} samples with inf or nan:'
            f' {len(rows)} of {len(samples)}, of the seeds {seeds}. {why}.'
        )

    def _draw(
        self, network: nn.Module, noises: Tensor, cond: Conditions, sampling: Sampling
    ) -> Tensor:
        z = noises[0]
        most = self.generators.get(sampling.network)
        if most == 1:
            return network(z, **cond)
        if most is not None:
            eps = None if sampling.deterministic else noises[1:]
            return network(z, sampling.nfe, eps, **cond)
        if sampling.guidance is None:
            velocity = partial(network, **cond)
        else:
            own = _family(network).guidance_options if sampling.spacing == PIPELINE else {}
            guidance = ClassifierFreeGuidance(
                sampling.guidance, self.null, channels=sampling.guidance_channels, **own
            )
            velocity = partial(guidance, network, cond=cond)
        times = sampling.times(network, z.device)
        return FUNCTIONS.get(sampling.solver)(velocity, z, times)
