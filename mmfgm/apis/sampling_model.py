# Copyright (c) mmfgm authors.
"""A trained model for those who only sample from it: no network in memory but those asked for."""
import os.path as osp
from typing import Any, Dict, List, Optional

from safetensors import safe_open
from torch import nn

from mmfgm.engine.strategies import _autocast_forward as autocast_forward
from mmfgm.errors import UsageError
from mmfgm.models import FGM, FlowMatching, FlowModel, OneStepGenerator, load_network
from mmfgm.registry import MODELS, TASK_UTILS

from .artifacts import WEIGHTS_FILE, check_checkpoint


class SamplingModel(FlowModel):
    """The networks of a training's ``model``, each built and loaded by :meth:`load`; samples as :class:`FlowModel` does.

    At most one of those that the training makes is held, and the teacher beside it.

    Args:
        model (dict): ``model`` of a config of FGM or FlowMatching, or of an export.
        weights (str, optional): A training checkpoint (see :func:`mmfgm.models.read_state_dict`), a file of
            ``tools/merge_checkpoint.py``, or an export's folder. None for the teacher of FGM alone.
        export (dict, optional): Description of the export at ``weights``; its network takes the place of the model's.
        precision (str): ``'fp32'``, or ``'bf16'`` for bf16 compute with float32 weights.
        null (callable, optional): "No condition" for guidance, in place of the model's own.

    Attributes:
        available (list[str]): Networks that :meth:`load` knows, the one to sample from first.

    Raises:
        UsageError: If the model is of another kind, or ``weights`` are none for it.
    """

    def __init__(self, model: dict, weights: Optional[str] = None, export: Optional[dict] = None, precision: str = 'fp32',
                 null: Optional[Any] = None):
        super().__init__(decoder=(export or {}).get('model', model).get('decoder'))
        kind = MODELS.get(model.get('type', 'FGM'))
        if kind is None or not issubclass(kind, (FGM, FlowMatching)):
            raise UsageError(f'model.type is {model.get("type")!r}; expected is FGM or FlowMatching, or a class of yours that '
                             'inherits from one')
        if precision not in ('fp32', 'bf16'):
            raise UsageError(f"precision must be 'fp32' or 'bf16', but is {precision!r}")
        self.ema_decays = {}   # an average is one network among the available ones here
        self.model, self.weights, self.export, self.precision, self._null = model, weights, export, precision, null
        self.distilled = issubclass(kind, FGM)
        source = kind.ema_source
        if export is not None:
            trained = [export['network']]
        else:
            trained = [*model.get('ema', [f'{source}_ema']), source] if weights else []
            if weights:
                check_checkpoint(weights)
                trained = _merged_network(weights) or trained
        teacher = ['teacher'] if self.distilled and 'teacher' in model else []
        self.available: List[str] = [*trained, *teacher]
        self.one_step = tuple(trained) if self.distilled else ()
        if not self.available:
            raise UsageError(f'{kind.__name__} has no network without weights: name a checkpoint')

    @property
    def networks(self) -> Dict[str, nn.Module]:
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
            raise UsageError(f'there is no network {name!r} here; choose from {self.available}'
                             + ('' if name != 'teacher' else '; an export holds the generator alone: name the config too'))
        network = self._teacher() if name == 'teacher' else self._trained(name)
        self._describe(network.network if isinstance(network, OneStepGenerator) else network)
        if self.null is None:
            self.null = self._build_null()
        network.requires_grad_(False).eval()
        self.add_module(name, network.to(self.data_preprocessor.device))

    def _teacher(self) -> nn.Module:
        network = MODELS.build(self.model['network'])
        if self.model['teacher'].get('checkpoint') is not None:
            load_network(network, **self.model['teacher'])
        return self._in_precision(network)

    def _trained(self, name: str) -> nn.Module:
        held = [other for other in self.networks if other != 'teacher']
        if held:
            network = getattr(self, held[0])
        else:
            model = self.export['model'] if self.export else self.model
            network = MODELS.build(model['network'])
            if self.distilled:
                network = OneStepGenerator(network, **(model.get('generator') or {}))
            self._in_precision(network)
        if self.export is None:
            load_network(network, self.weights, '' if _merged_network(self.weights) else name)
        elif self.export['kind'] == 'generator':
            load_network(network, osp.join(self.weights, WEIGHTS_FILE))
        if held:
            delattr(self, held[0])
        return network

    def _in_precision(self, network: nn.Module) -> nn.Module:
        if self.precision == 'bf16':
            autocast_forward(network, self.data_preprocessor.device.type)
        return network

    def _build_null(self) -> Optional[Any]:
        null = self.model.get('null_condition') or (self.model.get('guidance') or {}).get('null')
        if null is None:
            return None
        return self._null if self._null is not None else TASK_UTILS.build(null)


def _merged_network(weights: str) -> Optional[List[str]]:
    """The network that a file of ``tools/merge_checkpoint.py`` holds, or None for another checkpoint."""
    if not osp.isfile(weights) or not weights.endswith('.safetensors'):
        return None
    with safe_open(weights, framework='pt') as file:
        name = (file.metadata() or {}).get('network')
    return [name] if name else None
