# Copyright (c) mmfgm authors.
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance, shifted_times, uniform_times
from mmfgm.registry import FUNCTIONS, TASK_UTILS

from .lora import copy_network

# what a dataset yields beside the network's conditions
NOT_CONDITIONS = ('idx', 'seed', 'x_0')
# real samples and their conditions, beside those that samples are generated for
REAL = 'real_'


@dataclass(frozen=True)
class Phase:
    """One kind of update inside a training iteration.

    Args:
        trains (tuple[str, ...]): Networks that this phase's loss updates.
        freezes (tuple[str, ...]): Trainable networks the gradient passes through without being
            kept.
        differentiable (bool): Whether the loss needs the gradient of the generated samples.
    """

    trains: tuple[str, ...]
    freezes: tuple[str, ...] = ()
    differentiable: bool = False


@dataclass(frozen=True)
class Sampling:
    """How to turn noise into samples: which network, and for an ODE which solver and how many
    evaluations.

    Args:
        network (str): Name of a network of the model, for example ``generator_ema`` or ``teacher``.
        nfe (int): Network evaluations; a one-step generator always takes 1.
        solver (str): A solver of :mod:`mmfgm.flow.ode`.
        shift (float, optional): The time grid of diffusers' scheduler of this shift, which SD3's
            pipeline uses (3 there). Defaults to evenly spaced times.
        guidance (float, optional): Scale of classifier-free guidance; one batched call, so one
            evaluation.

    Raises:
        UsageError: If the solver cannot spend exactly ``nfe`` evaluations.
    """

    network: str
    nfe: int = 1
    solver: str = 'euler'
    shift: float | None = None
    guidance: float | None = None

    def times(self, device) -> Tensor:
        """The solver's time grid, from 1 to 0."""
        steps = self.nfe // FUNCTIONS.get(self.solver).evaluations_per_step
        return (
            uniform_times(steps, device)
            if self.shift is None
            else shifted_times(steps, self.shift, device)
        )

    def __post_init__(self):
        solver = FUNCTIONS.get(self.solver)
        if solver is None:
            raise UsageError(f'there is no ODE solver {self.solver!r}; use euler or heun')
        if self.nfe < 1 or self.nfe % solver.evaluations_per_step:
            raise UsageError(
                f'{self.solver} spends {solver.evaluations_per_step} evaluations a step, so its NFE'
                f' must be a positive multiple of that, but got nfe={self.nfe}'
            )


class FlowModel(BaseModel):
    """What pre-training and distillation share: EMA copies, noise, conditions and sampling.

    Subclasses name their training phases in ``phases`` and implement ``loss(phase, samples)``. They
    never see an optimizer, a parallel wrapper or a logger.
    """

    phases: dict[str, Phase] = {}
    ema_source: str = ''
    # networks that come from elsewhere and are not part of this model's checkpoints
    pretrained: tuple[str, ...] = ()
    # networks that map noise to samples in one call; all others are integrated
    one_step: tuple[str, ...] = ()

    def __init__(self, data_preprocessor: dict | None = None, decoder: dict | None = None):
        super().__init__(data_preprocessor)
        self.decoder = TASK_UTILS.build(decoder) if decoder else None
        # maps conditions to "no condition", for guidance
        self.null: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
        # checksum of each pre-trained network, so that a resumed run notices another teacher
        self.fingerprints: dict[str, str] = {}

    def _describe(self, network: nn.Module) -> None:
        """Keep what the networks are for, before strategies wrap them."""
        self.event_shape = network.event_shape
        # None: the network does not say, so its conditions are its own business
        self.num_classes = getattr(network, 'num_classes', None)

    def _init_ema(self, ema: dict[str, float]) -> None:
        self.ema_decays = dict(ema)
        for name, decay in self.ema_decays.items():
            if not name.startswith(f'{self.ema_source}_ema') or not 0 <= decay < 1:
                raise UsageError(
                    f'ema must map names that start with {self.ema_source}_ema to decays in [0, 1),'
                    f' but got {name!r}: {decay!r}'
                )
            setattr(self, name, copy_network(getattr(self, self.ema_source)).requires_grad_(False))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Networks by name, in the order they were made; losses and preprocessors are not
        networks."""
        trained = [name for phase in self.phases.values() for name in phase.trains]
        known = {*trained, *self.pretrained, *self.ema_decays}
        return {name: child for name, child in self.named_children() if name in known}

    def init_weights(self) -> None:
        """Nothing: networks come initialised or loaded, and MMEngine must not undo that."""

    def check(self, sampling: 'Sampling') -> None:
        """Hold a sampling against the model, before any sample is drawn.

        Raises:
            UsageError: If there is no such network, or ``nfe`` is not 1 for a one-step generator.
        """
        if sampling.network not in self.networks:
            raise UsageError(
                f'{type(self).__name__} has no network {sampling.network!r}; choose from'
                f' {list(self.networks)}'
            )
        if sampling.network in self.one_step and sampling.nfe != 1:
            raise UsageError(
                f'{sampling.network} is a one-step generator: its NFE is 1, not {sampling.nfe}'
            )
        if sampling.guidance is not None and (
            self.null is None or sampling.network in self.one_step
        ):
            raise UsageError(
                f'guidance={sampling.guidance} of {sampling.network} needs a network that is'
                ' integrated, and a model that knows "no condition": set model.guidance (FGM) or'
                ' model.null_condition (FlowMatching)'
            )

    def train(self, mode: bool = True):
        """Averages and pre-trained networks stay in evaluation mode: no dropout in what we
        match."""
        super().train(mode)
        for name in (*self.ema_decays, *self.pretrained):
            getattr(self, name).eval()
        return self

    def conditions(self, batch: dict[str, Any], prefix: str = '') -> dict[str, Tensor]:
        """The part of a batch that the networks take as keyword arguments; that of real samples
        with ``prefix``."""
        names = [name for name in batch if name.startswith(REAL) == (prefix == REAL)]
        return {
            name[len(prefix) :]: batch[name]
            for name in names
            if name[len(prefix) :] not in NOT_CONDITIONS
        }

    def prepare(self, batch: dict[str, Any], differentiable: bool) -> dict[str, Any]:
        """Move a training batch to the device and add what every phase needs; see the subclass."""
        self._check_labels(batch)
        return self.data_preprocessor(batch, training=True)

    def _check_labels(self, batch: dict[str, Any]) -> None:
        """While labels are on the CPU, where looking is free; outside the classes they would mean
        "no class"."""
        labels = batch.get('labels')
        if self.num_classes is None or (labels is None and not self.num_classes):
            return
        if labels is None or not self.num_classes:
            raise UsageError(
                f'the network has {self.num_classes} classes, but the dataset gives '
                f'{"no labels" if labels is None else "labels"}; make the two agree'
            )
        if not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise UsageError(
                f'labels must lie in [0, {self.num_classes - 1}], but the dataset gives'
                f' {int(labels.min())} to {int(labels.max())}'
            )

    def loss(self, phase: str, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Losses (keys with ``loss``, summed for the gradient) and values to log, of one phase."""
        raise NotImplementedError(f'{type(self).__name__} does not define a loss')

    def forward(self, inputs: dict[str, Any], mode: str) -> dict[str, Tensor]:
        """The loss of phase ``mode`` on prepared ``inputs``; MMEngine's entry point."""
        return self.loss(mode, inputs)

    def seeded_noise(self, seeds) -> Tensor:
        """Standard normal noise ``(N, *event)``; each row depends on its own seed alone.

        Drawn on the CPU, so that the same seeds give the same images on every device.
        """
        rows = [
            torch.randn(self.event_shape, generator=torch.Generator().manual_seed(int(seed)))
            for seed in seeds
        ]
        return torch.stack(rows)

    @torch.no_grad()
    def sample(self, batch: dict[str, Any], sampling: Sampling) -> Tensor:
        """Generate one sample for each item of a batch ``dict(idx, seed, [labels, ...])``.

        Returns:
            Tensor: ``(N, *event)``, float32, on the model's device; images in [-1, 1] up to
                overshoot. With a
            decoder, the images.

        Raises:
            UsageError: See :meth:`check`.
        """
        self.check(sampling)
        self._check_labels(batch)
        inputs = self.data_preprocessor({**batch, 'z': self.seeded_noise(batch['seed'])})
        z = inputs.pop('z')
        cond = self.conditions(inputs)
        network = getattr(self, sampling.network)
        training = network.training
        network.eval()
        try:
            samples = (
                network(z, **cond)
                if sampling.network in self.one_step
                else self._integrate(network, z, cond, sampling)
            )
        finally:
            network.train(training)
        return samples if self.decoder is None else self.decoder(samples)

    def _integrate(
        self, network: nn.Module, z: Tensor, cond: dict[str, Tensor], sampling: Sampling
    ) -> Tensor:
        if sampling.guidance is None:
            velocity = partial(network, **cond)
        else:
            velocity = partial(
                ClassifierFreeGuidance(sampling.guidance, self.null), network, cond=cond
            )
        return FUNCTIONS.get(sampling.solver)(velocity, z, sampling.times(z.device))
