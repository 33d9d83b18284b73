# Copyright (c) mmfgm authors.
"""A trained model for those who only sample from it: no network in memory but those asked for."""

import os.path as osp
from typing import Any

from safetensors import safe_open
from torch import nn

from mmfgm.errors import UsageError
from mmfgm.models import (
    FGM,
    CachedNullPrompt,
    FlowMatching,
    FlowModel,
    OneStepGenerator,
    load_network,
)
from mmfgm.models.lora import LoRA
from mmfgm.models.sampling import bf16_autocast
from mmfgm.registry import MODELS, TASK_UTILS

from .artifacts import WEIGHTS_FILE, check_checkpoint


class SamplingModel(FlowModel):
    """The networks of a training's ``model``, each built and loaded by :meth:`load`; samples as
    :class:`FlowModel` does.

    At most one of those that the training makes is held, and the teacher beside it.

    Args:
        model (dict): ``model`` of a config of FGM or FlowMatching, or of an export.
        weights (str, optional): A training checkpoint (see :func:`mmfgm.models.read_state_dict`), a
            file of ``tools/merge_checkpoint.py``, or an export's folder. None for the teacher of
            FGM alone.
        export (dict, optional): Description of the export at ``weights``; its network takes the
            place of the model's.
        precision (str): ``'fp32'``, or ``'bf16'`` for bf16 compute with float32 weights.
        null (callable, optional): "No condition" for guidance, in place of the model's
            ``CachedNullPrompt``.

    Attributes:
        available (list[str]): Networks that :meth:`load` knows, the one to sample from first.

    Raises:
        UsageError: If the model is of another kind, or ``weights`` are none for it.
    """

    def __init__(
        self,
        model: dict,
        weights: str | None = None,
        export: dict | None = None,
        precision: str = 'fp32',
        null: Any | None = None,
    ):
        super().__init__()
        kind = MODELS.get(model.get('type', 'FGM'))
        if kind is None or not issubclass(kind, (FGM, FlowMatching)):
            raise UsageError(
                f'model.type is {model.get("type")!r}; expected is FGM or FlowMatching, or a class'
                ' of yours that inherits from one'
            )
        if precision not in ('fp32', 'bf16'):
            raise UsageError(f"precision must be 'fp32' or 'bf16', but is {precision!r}")
        self.ema_decays = {}  # an average is one network among the available ones here
        self.model, self.weights, self.export, self.precision, self._null = (
            model,
            weights,
            export,
            precision,
            null,
        )
        self.distilled = issubclass(kind, FGM)
        self._lora = LoRA(**model['lora']) if model.get('lora') and export is None else None
        self._base: list[nn.Module] = []  # a list, as it is no network of its own
        source = kind.ema_source
        if export is not None:
            trained = [export['network']]
        else:
            trained = [*model.get('ema', [f'{source}_ema']), source] if weights else []
            if weights:
                check_checkpoint(weights)
                trained = _merged_network(weights) or trained
        teacher = ['teacher'] if self.distilled and 'teacher' in model else []
        self.available: list[str] = [*trained, *teacher]
        self.one_step = tuple(trained) if self.distilled else ()
        if not self.available:
            raise UsageError(f'{kind.__name__} has no network without weights: name a checkpoint')
        decoder = (export or {}).get('model', model).get('decoder')
        self.decoder = TASK_UTILS.build(decoder) if decoder else None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that are loaded."""
        return {name: child for name, child in self.named_children() if name in self.available}

    def load(self, name: str) -> None:
        """Bring a network into memory; of the trained ones, it replaces the one that is there.

        Raises:
            UsageError: If there is no such network, or its weights do not fit.
        """
        if name in self.networks:
            return
        if name not in self.available:
            raise UsageError(
                f'there is no network {name!r} here; choose from {self.available}'
                + (
                    ''
                    if name != 'teacher'
                    else '; an export holds the generator alone: name the config too'
                )
            )
        network = self._teacher() if name == 'teacher' else self._trained(name)
        described = network.network if isinstance(network, OneStepGenerator) else network
        shape = getattr(self, 'event_shape', described.event_shape)
        if described.event_shape != shape:
            raise UsageError(
                f'the {name} of the config makes samples of shape {described.event_shape}, but'
                f' {self.weights!r} of shape {shape}: they do not belong together'
            )
        self._describe(described)
        if self.null is None:
            self.null = self._build_null()
        device = self.data_preprocessor.device
        if self.precision == 'bf16':
            self.autocast = bf16_autocast(device.type)
        self.add_module(name, network.eval().to(device))

    def _teacher(self) -> nn.Module:
        """As the training had it; with LoRA, the weights under the adapters too."""
        if not self._base:
            network = MODELS.build(self.model['network'])
            if self.model['teacher'].get('checkpoint') is not None:
                load_network(network, **self.model['teacher'])
            self._base.append(network)
        return self._base[0]

    def _trained(self, name: str) -> nn.Module:
        held = [other for other in self.networks if other != 'teacher']
        network = getattr(self, held[0]) if held else self._build()
        if self.export is None:
            adapters = (
                {key for key, p in network.named_parameters() if p.requires_grad}
                if self._lora
                else None
            )
            load_network(
                network, self.weights, '' if _merged_network(self.weights) else name, names=adapters
            )
        elif self.export['kind'] == 'generator':
            load_network(network, osp.join(self.weights, WEIGHTS_FILE))
        if held:
            delattr(self, held[0])
        return network

    def _build(self) -> nn.Module:
        model = self.export['model'] if self.export else self.model
        if self._lora:
            network = self._lora.adapted(self._teacher())
        else:
            network = MODELS.build(model['network'])
        if not self.distilled:
            return network
        return MODELS.build(
            {'type': 'OneStepGenerator', **(model.get('generator') or {}), 'network': network}
        )

    def _build_null(self) -> Any | None:
        null = self.model.get('null_condition') or (self.model.get('guidance') or {}).get('null')
        if null is None:
            return None
        kind = TASK_UTILS.get(null['type']) if isinstance(null['type'], str) else null['type']
        # its cache may be absent where prompts are encoded here
        return (
            self._null
            if self._null is not None and kind is CachedNullPrompt
            else TASK_UTILS.build(null)
        )


def _merged_network(weights: str) -> list[str] | None:
    """The network that a file of ``tools/merge_checkpoint.py`` holds, or None for another
    checkpoint."""
    if not osp.isfile(weights) or not weights.endswith('.safetensors'):
        return None
    with safe_open(weights, framework='pt') as file:
        name = (file.metadata() or {}).get('network')
    return [name] if name else None
