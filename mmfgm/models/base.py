# Copyright (c) mmfgm authors.
from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from mmengine.model import BaseModel
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.registry import MODELS, TASK_UTILS

from .sampling import Conditions, Sampler, Sampling, check_labels


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


class FlowModel(BaseModel):
    """What a trainable model is: named networks, the phases that train them, and their averages.

    Subclasses name their training phases in ``phases`` and implement ``loss(phase, samples)``. They
    never see an optimizer, a parallel wrapper or a logger. Samples are drawn by :attr:`sampler`.
    """

    phases: dict[str, Phase] = {}
    ema_source: str = ''
    # networks that come from elsewhere and are not part of this model's checkpoints
    pretrained: tuple[str, ...] = ()
    # networks that map noise to samples, and the most calls that a sample of each takes; all others
    # are integrated
    generators: dict[str, int] = {}
    event_shape: tuple[int, ...]
    num_classes: int | None
    # iterations that training has finished; the loop says so, for what begins later
    iteration: int = 0

    def __init__(self, data_preprocessor: dict | None = None, decoder: dict | None = None):
        super().__init__(data_preprocessor)
        self.decoder = TASK_UTILS.build(decoder) if decoder else None
        # maps conditions to "no condition", for guidance
        self.null: Callable[[Conditions], Conditions] | None = None
        # makes the context in which networks run; a strategy that computes in bf16 sets it
        self.autocast: Callable[[], AbstractContextManager] = nullcontext

    @classmethod
    def build(cls, cfg: dict, networks: Collection[str] | None = None) -> FlowModel:
        """Build the model of a config, or the part of it that holds some of its networks.

        Args:
            cfg (dict): ``model`` of a config.
            networks (Collection[str], optional): Names, for example ``('generator_ema',)``: no
                other network is made or loaded. Such a part samples, but cannot be trained.
                Defaults to all.

        Raises:
            UsageError: If the model has no such network, or is of another kind than this class.
        """
        cfg = dict(cfg)
        kind = MODELS.get(cfg.pop('type', cls.__name__))
        if kind is None or not issubclass(kind, cls):
            raise UsageError(
                f'expected a model.type that is a {cls.__name__}, found'
                f' {kind.__name__ if kind else "a name that is not registered"}; name FGM,'
                ' FlowMatching, or a class of yours that inherits from one'
            )
        return kind(**cfg, networks=networks)

    @classmethod
    def network_names(cls, cfg: dict) -> list[str]:
        """Names of the networks that a ``model`` config makes, in the order they are made."""
        raise NotImplementedError(f'{cls.__name__} does not name its networks')

    def _choose(self, available: list[str], networks: Collection[str] | None) -> list[str]:
        """Those of the ``available`` networks that are to be made."""
        unknown = sorted(set(networks or ()) - set(available))
        if unknown:
            raise UsageError(
                f'expected networks of {type(self).__name__}, which are {available}, found'
                f' {unknown}; name some of the former'
            )
        return [name for name in available if networks is None or name in networks]

    def _describe(self, network: Any) -> None:
        """Keep what the networks are for, before strategies wrap them."""
        self.event_shape = network.event_shape
        # None: the network does not say, so its conditions are its own business
        self.num_classes = getattr(network, 'num_classes', None)

    def _check_ema(self, ema: dict[str, float]) -> None:
        for name, decay in ema.items():
            if not name.startswith(f'{self.ema_source}_ema') or not 0 <= decay < 1:
                raise UsageError(
                    f'ema must map names that start with {self.ema_source}_ema to decays in [0, 1),'
                    f' but got {name!r}: {decay!r}'
                )

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Networks by name, in the order they were made; losses and preprocessors are not
        networks."""
        trained = [name for phase in self.phases.values() for name in phase.trains]
        known = {*trained, *self.pretrained, *self.ema_decays}
        return {name: child for name, child in self.named_children() if name in known}

    @property
    def sampler(self) -> Sampler:
        """Draws with the networks as they are now, wrapped or not."""
        return Sampler(
            self.networks,
            self.event_shape,
            self.generators,
            self.num_classes,
            self.null,
            self.decoder,
            self.data_preprocessor,
            self.autocast,
            type(self).__name__,
        )

    def init_weights(self) -> None:
        """Nothing: networks come initialised or loaded, and MMEngine must not undo that."""

    def check(self, sampling: Sampling) -> None:
        """See :meth:`Sampler.check`."""
        self.sampler.check(sampling)

    def sample(self, batch: dict[str, Any], sampling: Sampling) -> Tensor:
        """See :meth:`Sampler.sample`."""
        return self.sampler.sample(batch, sampling)

    def train(self, mode: bool = True):
        """Averages and pre-trained networks stay in evaluation mode: no dropout in what we
        match."""
        super().train(mode)
        for name, network in self.networks.items():
            if name in self.ema_decays or name in self.pretrained:
                network.eval()
        return self

    def prepare(self, batch: dict[str, Any], differentiable: bool) -> dict[str, Any]:
        """Move a training batch to the device and add what every phase needs; see the subclass."""
        check_labels(batch.get('cond', {}), self.num_classes)
        return {'cond': {}, **self.data_preprocessor(batch, training=True)}

    def check_data(self, dataset: Any) -> None:
        """Compare the training data with the model, before the first iteration; nothing to say
        unless the subclass knows more than what every batch is checked for."""

    def loss(self, phase: str, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Losses (keys with ``loss``, summed for the gradient) and values to log, of one phase."""
        raise NotImplementedError(f'{type(self).__name__} does not define a loss')

    def check_joint(self) -> None:
        """Whether there is a :meth:`joint_loss`.

        Raises:
            UsageError: If phases have nothing to compute together.
        """
        raise UsageError(
            f'expected a model whose phases can share a velocity, found {type(self).__name__}; set'
            ' train_cfg.share_velocity=False'
        )

    def joint_loss(self, samples: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """:meth:`loss` of every phase from what they can compute together, in the order in which
        their gradients are taken."""
        raise NotImplementedError(f'{type(self).__name__} does not define a joint loss')

    def forward(self, inputs: dict[str, Any], mode: str) -> dict[str, Tensor]:
        """The loss of phase ``mode`` on prepared ``inputs``; MMEngine's entry point."""
        return self.loss(mode, inputs)
