# Copyright (c) mmfgm authors.
"""What an export, or a work dir that stands for its config, may say: known kinds and plain values.

A config is a program of its owner's, and the registry builds whatever a config names, dotted names
of any module included. An export comes from somebody else, so its description is data: each part
must be of a kind that is listed for its place, with arguments of that kind's own. A run's config
beside its checkpoint is longer: it may name whatever is registered, and nothing that runs code.
"""

import re
from collections.abc import Mapping
from typing import Any

from mmengine.registry import Registry

from mmfgm import registry
from mmfgm.config import leaves
from mmfgm.errors import UsageError
from mmfgm.models.families import FAMILIES

# Kind to the places of further kinds among its arguments. A name is not enough to build something:
# it must be registered by us or by the program that loads the export.
UNETS: dict[str, dict] = {'ADMUNet': {}, 'EDMUNet': {}}
NETWORKS: dict[str, dict[str, dict]] = {
    'AdaLNMLP': {},
    'EDMVelocity': dict(unet=UNETS),
    'SiT': {},
    'UNetVelocity': dict(unet=UNETS),
}
GENERATORS: dict[str, dict[str, dict]] = {
    'DataSpaceGenerator': {},
    'FewStepGenerator': {},
    'OneStepGenerator': {},
}
DECODERS: dict[str, dict[str, dict]] = {'LatentDecoder': {}}
ENCODERS: dict[str, dict[str, dict]] = {'WordEncoder': {}}
PLACES = dict(network=NETWORKS, generator=GENERATORS, decoder=DECODERS, text_encoder=ENCODERS)
# they change what a builder does rather than say what is built
FORBIDDEN = ('weights_only', 'checkpoint', 'init_cfg')
# keys of a config whose value is looked up in a registry, which imports what it does not know
NAMES_AT = ('type', 'constructor', 'solver')
SCOPES_AT = ('default_scope', '_scope_')
SCOPES = ('mmfgm', 'mmengine')
DTYPES = ('float32', 'bfloat16', 'float16')
KINDS = ('generator', 'pipeline', 'lora')


def allow_in_exports(place: str, kind: str) -> None:
    """Let exports name a kind of your own, which your program has registered.

    Args:
        place (str): ``'network'``, ``'generator'``, ``'decoder'`` or ``'text_encoder'``.
        kind (str): Its name in the registry. It will be built with arguments that come from the
            export, so it must do no harm whatever they are.

    Raises:
        UsageError: If there is no such place, or the name has a dot.
    """
    if place not in PLACES or not re.fullmatch(r'\w+', kind):
        raise UsageError(
            f'expected a place of {list(PLACES)} and a name without dots, found {place!r} and'
            f' {kind!r}; name the class as it is registered'
        )
    PLACES[place].setdefault(kind, {})


def check_description(export: Any, file: str) -> None:
    """Refuse a description that says anything but what an export of ours says.

    Args:
        export: The content of an export's JSON file.
        file (str): Its path, for messages.

    Raises:
        UsageError: Names the first place that is not as expected.
    """
    export = _mapping(export, file, 'the description')
    if export.get('kind') not in KINDS:
        _refuse(file, 'kind', f'one of {KINDS}', export.get('kind'))
    if not isinstance(export.get('network'), str) or not re.fullmatch(r'\w+', export['network']):
        _refuse(file, 'network', 'the name of a network', export.get('network'))
    if export['kind'] == 'lora':
        return
    model = _mapping(export.get('model'), file, 'model')
    for name in model:
        if name not in ('type', 'network', 'generator', 'decoder'):
            _refuse(file, 'model', 'only type, network, generator and decoder in it', name)
    if model.get('type', 'FGM') != 'FGM':
        _refuse(file, 'model.type', "'FGM'", model['type'])
    families = {family.network.__name__: {} for family in FAMILIES.values()}
    _part(model.get('network'), {**NETWORKS, **families}, file, 'model.network')
    if model.get('generator') is not None:
        generator = {'type': 'OneStepGenerator', **_mapping(model['generator'], file, 'generator')}
        _part(generator, GENERATORS, file, 'model.generator')
    if model.get('decoder') is not None:
        decoders = {family.decoder('')['type']: {} for family in FAMILIES.values()}
        _part(model['decoder'], {**DECODERS, **decoders}, file, 'model.decoder')
    encoder = export.get('text_encoder')
    if encoder is not None:
        encoder = _mapping(encoder, file, 'text_encoder')
        if 'family' in encoder:
            if encoder['family'] not in FAMILIES:
                _refuse(file, 'text_encoder.family', f'one of {list(FAMILIES)}', encoder['family'])
            _plain(encoder, file, 'text_encoder')
        else:
            _part(encoder, ENCODERS, file, 'text_encoder')


def check_run_config(cfg: Mapping[str, Any], file: str) -> None:
    """Refuse a run's config that could run code, where its work dir alone was named.

    Args:
        cfg (Mapping): As :func:`~mmfgm.apis.config.read_dump` gives it.
        file (str): Its path, for messages.

    Raises:
        UsageError: Names the first value that imports a module, runs a Python file, or lets a file
            run code.
    """
    known: set[str] = set()
    for place, value in leaves(dict(cfg.items()), ''):
        keys = place.split('.')
        if 'custom_imports' in keys:
            _refuse_run(file, place, 'no module to import', value)
        if 'init_cfg' in keys or (keys[-1] == 'trust_remote_code' and value):
            _refuse_run(file, place, 'left out', value)
        if keys[-1] == 'weights_only' and not value:
            _refuse_run(file, place, 'True', value)
        if isinstance(value, str) and value.endswith('.py'):
            _refuse_run(file, place, 'no Python file', value)
        if keys[-1] in SCOPES_AT and value not in (None, *SCOPES):
            _refuse_run(file, place, f'one of {SCOPES}', value)
        if keys[-1] in NAMES_AT and isinstance(value, str):
            known = known or _registered()
            scope, _, name = value.rpartition('.')
            if name not in known or scope not in ('', *SCOPES):
                _refuse_run(file, place, 'a name that is registered', value)


def _registered() -> set[str]:
    """Every name that a registry knows, of ours, of MMEngine's, and of the program's own."""
    found = [value for value in vars(registry).values() if isinstance(value, Registry)]
    for each in found:
        if each.scope == 'mmfgm':
            each.import_from_location()
    return {name for each in found for name in each.module_dict}


def _refuse_run(file: str, place: str, expected: str, found: Any) -> None:
    raise UsageError(
        f'expected {place} of {file!r} to be {expected}, found {str(found)[:80]!r}: what could run'
        ' code is not taken from a work dir; if you trust it, give its config before the work dir'
    )


def _part(part: Any, kinds: Mapping[str, dict], file: str, place: str) -> None:
    """One thing that is built: of a listed kind, with plain arguments or further listed kinds."""
    part = _mapping(part, file, place)
    kind = part.get('type')
    if not isinstance(kind, str) or kind not in kinds:
        _refuse(file, f'{place}.type', f'one of {sorted(kinds)}', kind)
    inner = kinds[kind]
    for name, value in part.items():
        if name in inner:
            _part(value, inner[name], file, f'{place}.{name}')
        elif name != 'type':
            _plain({name: value}, file, place)


def _plain(value: Any, file: str, place: str, depth: int = 0) -> None:
    """Numbers, text, and containers of them, none of which a builder would take for a config."""
    if depth > 8:
        _refuse(file, place, 'at most 8 levels', 'more')
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == 'type' or name in FORBIDDEN or name.startswith('_'):
                _refuse(file, place, 'plain arguments', f'the key {name!r}')
            if name in ('dtype', 'torch_dtype') and inner not in DTYPES:
                _refuse(file, f'{place}.{name}', f'one of {DTYPES}', inner)
            _plain(inner, file, f'{place}.{name}', depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _plain(inner, file, place, depth + 1)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        _refuse(file, place, 'a plain value', type(value).__name__)


def _mapping(value: Any, file: str, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _refuse(file, place, 'an object with names', value)
    return value


def _refuse(file: str, place: str, expected: str, found: Any) -> None:
    raise UsageError(
        f'expected {place} of {file!r} to be {expected}, found {str(found)[:80]!r}; export again,'
        ' or, if it names a class of yours, register it and call mmfgm.apis.allow_in_exports'
    )
