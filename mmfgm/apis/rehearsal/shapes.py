# Copyright (c) mmfgm authors.
"""The model and the batch of a config, of which nothing is known but shapes and types."""

import os
import os.path as osp
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from mmfgm.apis.config import building
from mmfgm.errors import UsageError
from mmfgm.files import read_json
from mmfgm.models import FlowModel
from mmfgm.models.families import family_of
from mmfgm.registry import MODELS

ARCHITECTURES = osp.join(osp.dirname(__file__), 'architectures')


def known_architectures() -> dict[str, str]:
    """Hub id to file of the networks whose architectures come with mmfgm."""
    return {
        name[: -len('.json')].replace('--', '/'): osp.join(ARCHITECTURES, name)
        for name in sorted(os.listdir(ARCHITECTURES))
    }


def without_weights(network: dict[str, Any]) -> dict[str, Any]:
    """The config of a network that names pre-trained weights, as one that states its architecture
    instead: that of a local folder, or of a model on the hub that comes with mmfgm.

    Raises:
        UsageError: If neither says what it is.
    """
    pretrained = network.get('pretrained')
    if not pretrained:
        return network
    family = family_of(network['type'])
    if family is None:
        raise UsageError(
            'expected a network whose shapes are known without its weights, found'
            f' {network["type"]} with pretrained={pretrained!r}, which has to be loaded for them;'
            ' give its arguments in model.network, without pretrained'
        )
    if osp.isdir(pretrained):
        return building(lambda: family.without_weights(network))
    known = known_architectures()
    if pretrained not in known:
        raise UsageError(
            f'expected model.network.pretrained to be a local folder or one of {list(known)}, whose'
            f' architectures come with mmfgm, found {pretrained!r}, whose shapes stand beside its'
            ' weights; a rehearsal does not ask the hub: put the config.json of its network where a'
            f' download would (FOLDER/{family.subfolder}/config.json), and set pretrained=FOLDER'
        )
    facts = read_json(known[pretrained], 'install mmfgm again', dict)
    dropped = ('pretrained', 'subfolder', 'revision', 'variant')
    return {
        **{key: value for key, value in network.items() if key not in dropped},
        'config': {key: value for key, value in facts.items() if key[0] != '_'},
    }


class _SameCondition:
    """Stands in for "no condition", which has the same shapes."""

    def __call__(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return cond


def build_without_weights(cfg: Config, device: str = 'meta') -> FlowModel:
    """The config's model, of which no weights are read: without values, on the meta device, or as
    it is initialised on another one.

    Raises:
        UsageError: If one of its parts needs values.
    """
    model = cfg.model.to_dict()
    model['decoder'] = None  # runs in evaluations only
    if model.get('teacher'):
        model['teacher'] = dict(checkpoint=None)
    if model.get('guidance'):
        model['guidance']['null'] = dict(type=_SameCondition)
    if model.get('null_condition'):
        model['null_condition'] = dict(type=_SameCondition)
    if 'network' in model:
        model['network'] = without_weights(model['network'])

    def build() -> FlowModel:
        try:
            return MODELS.build(model)
        except RuntimeError as e:
            raise UsageError(
                f'the model cannot be built on the meta device, without values: {str(e)[:300]}'
            ) from e

    with torch.device(device):
        return building(build)


def dummy_batch(network: Any, batch_size: int) -> dict[str, Any]:
    """A training batch of zeros; conditions of further shapes come from
    ``network.dummy_conditions(batch_size)``.

    Raises:
        UsageError: If the network does not say which conditions it takes.
    """
    if hasattr(network, 'dummy_conditions'):
        cond = network.dummy_conditions(batch_size)
    elif getattr(network, 'num_classes', None) is not None:
        labels = torch.zeros(batch_size, dtype=torch.int64)
        cond = dict(labels=labels) if network.num_classes else {}
    else:
        raise UsageError(
            f'expected a network that says which conditions it takes, found'
            f' {type(network).__name__}; give it num_classes (0: none) or'
            ' dummy_conditions(batch_size) -> dict of tensors'
        )
    x_0 = torch.zeros(batch_size, *network.event_shape)
    idx = torch.arange(batch_size)
    return dict(idx=idx, x_0=x_0, cond=cond, real=dict(x_0=x_0, cond=cond))


def training_batch(cfg: Config, model: FlowModel, batch_size: int) -> dict[str, Any]:
    """A batch of the shapes that the config's data have: real samples only where it names some."""
    batch = dummy_batch(next(iter(model.networks.values())), batch_size)
    dataset = cfg.train_dataloader.dataset
    if dataset.get('type') != 'WithReal':
        del batch['real']
        return batch
    shape = dataset.get('real', {}).get('latent_shape')
    if shape is not None:
        batch['real']['x_0'] = torch.zeros(batch_size, *shape)
    return batch
