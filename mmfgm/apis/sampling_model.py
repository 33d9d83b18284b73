# Copyright (c) mmfgm authors.
"""A trained model for those who only sample from it: no network in memory but those asked for."""

import os.path as osp
from contextlib import nullcontext
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.models import (
    FGM,
    CachedNullPrompt,
    FlowMatching,
    FlowModel,
    Sampler,
    Sampling,
    bf16_autocast,
    load_network,
    max_nfe,
    read_safetensors_metadata,
)
from mmfgm.registry import MODELS, TASK_UTILS

from .artifacts import WEIGHTS_FILE, check_checkpoint
from .config import building
from .sizes import check_sizes

# Guidance and decoder are made here, once, and not with each part.
APART: dict[type[FlowModel], dict[str, Any]] = {
    FGM: dict(guidance=None, decoder=None),
    FlowMatching: dict(teacher=None, null_condition=None, null_prob=0.0, decoder=None),
}
# An export leaves out what only training needs.
TRAINING = dict(
    teacher=dict(checkpoint=None),
    fm_time_sampler=dict(type='Uniform'),
    fgm_time_sampler=dict(type='Uniform'),
)


class SamplingModel:
    """The networks of a training's ``model``, each built and loaded by :meth:`load`.

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
        device (str): Where the networks go. Defaults to ``'cpu'``.

    Attributes:
        available (list[str]): Networks that :meth:`load` knows, the one to sample from first.
        networks (dict[str, nn.Module]): Those that are loaded.
        generators (dict[str, int]): Those that map noise to samples, and the most calls that a
            sample of each takes.

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
        device: str | torch.device = 'cpu',
    ):
        kind = MODELS.get(model.get('type', 'FGM'))
        if kind is None or not issubclass(kind, (FGM, FlowMatching)):
            raise UsageError(
                f'model.type is {model.get("type")!r}; expected FGM or FlowMatching, or a class'
                ' of yours that inherits from one'
            )
        if precision not in ('fp32', 'bf16'):
            raise UsageError(
                "precision must be 'fp32', 'bf16' or, of FGMInferencer, 'auto', but is"
                f' {precision!r}'
            )
        self.model = model
        self.weights = weights
        self.export = export
        self._null = null
        self.kind = kind
        self.distilled = issubclass(kind, FGM)
        self.device = torch.device(device)
        self.precision = bf16_autocast(self.device.type) if precision == 'bf16' else nullcontext
        self._preprocess = BaseDataPreprocessor().to(self.device)
        trained = self._trained_names()
        teacher = ['teacher'] if self.distilled and 'teacher' in model else []
        self.available: list[str] = [*trained, *teacher]
        described = (export or {}).get('model', model)
        self.generators: dict[str, int] = {}
        if self.distilled:
            most = building(lambda: max_nfe(described.get('generator')))
            self.generators = dict.fromkeys(trained, most)
        if not self.available:
            raise UsageError(f'{kind.__name__} has no network without weights: name a checkpoint')
        decoder = described.get('decoder')
        self.decoder = TASK_UTILS.build(decoder) if decoder else None
        self.null: Any | None = None
        self.networks: dict[str, nn.Module] = {}
        self.event_shape: tuple[int, ...] = ()
        self.num_classes: int | None = None
        # with adapters, the model in which a trained network and the teacher share weights
        self._adapted: FlowModel | None = None

    def _trained_names(self) -> list[str]:
        if self.export is not None:
            return [self.export['network']]
        if not self.weights:
            return []
        check_checkpoint(self.weights)
        source = self.kind.ema_source
        named = self.kind.network_names(self.model)
        averages = [name for name in named if name.startswith(f'{source}_ema')]
        return merged_network(self.weights) or [*averages, source]

    @property
    def sampler(self) -> Sampler:
        """Draws with the networks that are loaded."""
        return Sampler(
            self.networks,
            self.event_shape,
            self.generators,
            self.num_classes,
            self.null,
            self.decoder,
            self._preprocess,
            self.precision,
            self.kind.__name__,
        )

    def sample(self, batch: dict[str, Any], sampling: Sampling) -> Tensor:
        """See :meth:`Sampler.sample <mmfgm.models.sampling.Sampler.sample>`."""
        return self.sampler.sample(batch, sampling)

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
        held = [other for other in self.networks if other != 'teacher']
        if name != 'teacher' and held:
            network = self._read(self.networks[held[0]], name)
            del self.networks[held[0]]
        else:
            network = self._make(name)
        if self.null is None:
            self.null = self._build_null()
        self.networks[name] = network.eval().to(self.device)

    def _make(self, name: str) -> nn.Module:
        """Build a network, with its weights."""
        part = self._part(name)
        shape = self.event_shape or part.event_shape
        if part.event_shape != shape:
            raise UsageError(
                f'the {name} of the config makes samples of shape {part.event_shape}, but'
                f' {self.weights!r} of shape {shape}: they do not belong together'
            )
        self.event_shape = part.event_shape
        self.num_classes = part.num_classes
        if name == 'teacher':
            return part.teacher
        trained = [network for other, network in part.networks.items() if other != 'teacher']
        return self._read(trained[0], name)

    def _part(self, name: str) -> FlowModel:
        """The model of the config or the export, with this network alone; with adapters, a trained
        one and the teacher, whose weights it shares."""
        if self._adapted is not None:
            return self._adapted
        exported = self.export is not None and name != 'teacher'
        cfg = dict(self.export['model'] if exported else self.model)
        if exported and self.export['kind'] == 'generator':
            check_sizes(self.weights, cfg)
        cfg['type'] = self.model.get('type', 'FGM')
        cfg.update(APART[FGM if self.distilled else FlowMatching])
        if self.distilled:
            cfg = {**TRAINING, **cfg}
        adapted = self._has_adapters and not exported
        if self.distilled and not adapted:
            cfg['lora'] = None
        wanted = [name]
        if adapted:
            wanted = [self.available[0] if name == 'teacher' else name, 'teacher']
        # the one average that is asked for is all that there are, whatever the config trains
        averages = [other for other in wanted if other not in ('teacher', self.kind.ema_source)]
        cfg['ema'] = dict.fromkeys(averages, 0.0)
        part = self.kind.build(cfg, networks=wanted)
        self._adapted = part if adapted else None
        return part

    @property
    def _has_adapters(self) -> bool:
        return bool(self.model.get('lora') and self.weights and self.export is None)

    def _read(self, network: nn.Module, name: str) -> nn.Module:
        """Load the weights of a trained network."""
        if self.export is not None:
            if self.export['kind'] == 'generator':
                load_network(network, osp.join(self.weights, WEIGHTS_FILE))
            return network
        adapters = None
        if self._has_adapters:
            adapters = {key for key in network.state_dict() if '.lora_' in key}
        prefix = '' if merged_network(self.weights) else name
        return load_network(network, self.weights, prefix, names=adapters)

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


def merged_network(weights: str) -> list[str] | None:
    """The network that a file of ``tools/merge_checkpoint.py`` holds, or None for another
    checkpoint."""
    if not osp.isfile(weights) or not weights.endswith('.safetensors'):
        return None
    name = read_safetensors_metadata(weights).get('network')
    return [name] if name else None
