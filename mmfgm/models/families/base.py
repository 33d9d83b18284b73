# Copyright (c) mmfgm authors.
"""What one kind of pre-trained model brings along, and how the right one is found.

Caches, the inferencer, export and the rehearsal know no model by name: they ask its
family. Adding FLUX or SANA means one file or folder beside ``sd3``, with

1. a network, registered in ``MODELS``: an ``nn.Module`` with ``forward(x_t, t, **cond) -> v`` in
   our convention (``t`` in [0, 1] from data to noise, ``v = eps - x_0``), ``event_shape``, and
   ``dummy_conditions(batch_size)``; for a GAN also ``forward(..., feature_layer=)``,
   ``check_feature_layer(layer)`` and ``feature_dim``. Scaling of ``t``, sign and packing stay here;
2. a :class:`PromptEncoder`: prompts to the keyword arguments of that ``forward``;
3. a :class:`Family` (most likely a :class:`~mmfgm.models.families.pipelines.DiffusersFamily`) that
   ties them together, decorated with :func:`register_family`;
4. a line in ``families/__init__.py``;
5. a proof in ``tests/test_models/test_families``: N Euler steps of ours with guidance give the
   latents of the stock pipeline on a tiny random model (float32, 1e-5).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.flow import shifted_times, uniform_times
from mmfgm.registry import MODELS

Condition = dict[str, Tensor]
# prompts tokenised at a time, where they are only counted
AT_A_TIME = 10000


def above(counts: Sequence[int], most: int, unit: str = 'tokens') -> list[str | None]:
    """Reasons why prompts of so many tokens are too long, None where they are not."""
    return [f'has {n} {unit}, more than {most}' if n > most else None for n in counts]


class PromptEncoder(ABC):
    """Prompts to conditions, loaded once and used many times.

    A cache stores a batch of conditions as *parts*: by default each condition is one part of its
    own name. A family that can store less (no padding, no zero channels) overrides :meth:`store`,
    :attr:`layout` and :attr:`conditions`; where a part ``a`` comes without padding, it is
    ``(tokens, D)``, the items' tokens one after the other, and ``a_tokens (N,)`` says how many
    each item has.

    Attributes:
        components (dict[str, Any]): Models and tokenizers by name; a cache remembers a checksum of
            each, and refuses to be continued with others.
        settings (dict[str, Any]): What the values depend on beside prompts and components.
    """

    components: dict[str, Any] = {}
    settings: dict[str, Any] = {}

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The conditions ``(N, ...)`` of ``N`` prompts; ``''`` means "no prompt"."""

    def to(self, device: str | torch.device) -> 'PromptEncoder':
        """Move to a device, in place."""
        _move(self.components, device)
        return self

    def too_long(self, prompts: Sequence[str]) -> list[str | None]:
        """Why each prompt is too long, for example by :func:`above`, or None where it is not."""
        return [None] * len(prompts)

    def bad(self, prompts: Sequence[Any]) -> dict[int, str]:
        """Number to reason of the prompts that are not text, are empty, or are too long."""
        bad = {
            i: 'is empty'
            if prompt is None or isinstance(prompt, str)
            else f'is not text but {prompt!r:.40}'
            for i, prompt in enumerate(prompts)
            if not isinstance(prompt, str) or not prompt.strip()
        }
        good = [i for i in range(len(prompts)) if i not in bad]
        for first in range(0, len(good), AT_A_TIME):
            part = good[first : first + AT_A_TIME]
            reasons = self.too_long([prompts[i] for i in part])
            bad.update({i: reason for i, reason in zip(part, reasons) if reason})
        return dict(sorted(bad.items()))

    def check(self, prompts: Sequence[str]) -> None:
        """Hold prompts against the limit, before any is encoded; the empty prompt is one, meaning
        "no prompt".

        Raises:
            UsageError: Names the first prompt that is not text or too long.
        """
        for i, reason in self.bad(prompts).items():
            if reason != 'is empty':
                raise UsageError(
                    f'prompt {i + 1} of {len(prompts)} {reason}: {str(prompts[i])[:60]!r};'
                    ' shorten it'
                )

    @property
    def conditions(self) -> dict[str, list[str]]:
        """The parts that each condition is made of, in the order in which they are joined."""
        return {name: [name] for name in self.layout}

    @property
    def layout(self) -> dict[str, list[int]]:
        """The shape of one item of each part, padding included."""
        return {name: list(value.shape[1:]) for name, value in self.encode(['']).items()}

    def store(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The parts of a batch, on the CPU."""
        return {name: value.cpu() for name, value in self.encode(prompts).items()}


class LatentEncoder(ABC):
    """Images to latents, loaded once and used many times.

    Attributes:
        factor (int): Pixels per latent.
        channels (int): Of the latents.
        components (dict[str, Any]), settings (dict[str, Any]): As in :class:`PromptEncoder`.
    """

    factor: int
    channels: int
    components: dict[str, Any] = {}
    settings: dict[str, Any] = {}

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents ``(N, C, h, w)`` as the network expects them, of images ``(N, 3, H, W)`` in
        [-1, 1]."""

    def to(self, device: str | torch.device) -> 'LatentEncoder':
        """Move to a device, in place."""
        _move(self.components, device)
        return self


class Family(ABC):
    """All knowledge about one kind of pre-trained model; stateless.

    Attributes:
        name (str): By which configs and caches know it.
        title (str): By which people know it; messages say it.
        network (type): The network's class, registered in ``MODELS``.
        prompt_encoder (type): Class of its :class:`PromptEncoder`; the first argument is
            ``pretrained``, and ``dtype`` is among the others.
        pipelines (tuple[str, ...]): How the class names in ``model_index.json`` begin.
        shift (float, optional): Of the pipeline's own time grid.
        subfolder (str): Where a pipeline in diffusers' format keeps the network.
        block_types (tuple[str, ...]): Class names of the repeated blocks, by which FSDP2 shards.
        adapter_targets (tuple[str, ...]): Endings of the names of the layers LoRA adapts.
        folds (bool): Whether a one-step generator can be exported as the family's own pipeline, see
            :class:`~mmfgm.models.families.pipelines.DiffusersFamily`.
    """

    name: str
    title: str
    network: type[nn.Module]
    prompt_encoder: Callable[..., PromptEncoder]
    pipelines: tuple[str, ...] = ()
    shift: float | None = None
    subfolder: str = 'transformer'
    block_types: tuple[str, ...] = ()
    adapter_targets: tuple[str, ...] = ()
    folds = False

    def recognises(self, index: dict[str, Any]) -> bool:
        """Whether a ``model_index.json`` is of this family."""
        return str(index.get('_class_name')).startswith(self.pipelines)

    def load(self, pretrained: str, **options: Any) -> nn.Module:
        """The network with its pre-trained weights; ``options`` are those of its class."""
        return self.network(pretrained=pretrained, **options)

    @abstractmethod
    def without_weights(self, network: dict[str, Any]) -> dict[str, Any]:
        """The config of a network that names ``pretrained``, as one that states its architecture
        instead: it builds the same module with random weights, or on the meta device."""

    def encoder(self, pretrained: str, **options: Any) -> PromptEncoder:
        """What encodes prompts; ``options`` are those of its class, ``dtype`` among them.

        Raises:
            UsageError: If the family has no such option.
        """
        known = list(inspect.signature(self.prompt_encoder).parameters)[1:]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise UsageError(
                f'expected options of the prompt encoder of {self.title}, which are'
                f' {", ".join(known)}, found {", ".join(unknown)}; leave them out'
            )
        return self.prompt_encoder(pretrained, **options)

    def encode(self, pretrained: str, prompts: Sequence[str], **options: Any) -> Condition:
        """Prompts to conditions, for once; keep an :meth:`encoder` for more."""
        return self.encoder(pretrained, **options).encode(prompts)

    def null(self, encoder: PromptEncoder) -> Condition:
        """The condition that means "no prompt", for guidance, of one item."""
        return encoder.encode([''])

    @abstractmethod
    def decoder(self, pretrained: str) -> dict[str, Any]:
        """Config of what turns the network's samples into images, for ``model.decoder``."""

    @abstractmethod
    def latent_encoder(self, pretrained: str) -> LatentEncoder:
        """What turns images into the network's samples."""

    def times(self, steps: int, device: str | torch.device = 'cpu') -> Tensor:
        """The pipeline's own time grid ``(steps + 1,)``, from 1 to 0."""
        if self.shift is None:
            return uniform_times(steps, device)
        return shifted_times(steps, self.shift, device)


def _move(components: dict[str, Any], device: str | torch.device) -> None:
    for component in components.values():
        if isinstance(component, nn.Module):
            component.to(device)


FAMILIES: dict[str, Family] = {}


def register_family(cls: type[Family]) -> type[Family]:
    """Class decorator: make one of it and remember it by its name, in place of another."""
    FAMILIES[cls.name] = cls()
    return cls


def family_named(name: str) -> Family:
    """The family of a name.

    Raises:
        UsageError: If there is none.
    """
    if name not in FAMILIES:
        raise UsageError(f'there is no family {name!r} of models; choose from {list(FAMILIES)}')
    return FAMILIES[name]


def family_of(network: nn.Module | type | str | None) -> Family | None:
    """The family of a network, its class or its registered name; None for networks of ours."""
    cls = MODELS.get(network) if isinstance(network, str) else network
    cls = type(cls) if isinstance(cls, nn.Module) else cls
    if not isinstance(cls, type):
        return None
    return next((f for f in FAMILIES.values() if issubclass(cls, f.network)), None)
