# Copyright (c) mmfgm authors.
"""Values that a config writes once and every place that needs them refers to.

MMEngine evaluates the variables of a base file before ``--cfg-options`` and inheriting configs can
change them. A value ``'${latent_size}'`` stands for the top-level key ``latent_size`` after all
merging instead, so ``latent_size=64`` on a command line or in a downstream config reaches every
place.
"""

import copy
import re
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from mmfgm.errors import UsageError

# the top-level keys that our configs refer to
SHARED_KEYS = ('latent_cache', 'latent_size', 'num_classes', 'pretrained', 'prompt_cache')
REFERENCE = re.compile(r'\$\{(\w+)\}')


def resolve(cfg: MutableMapping, options: Iterable[str] = ()) -> MutableMapping:
    """Replace the references in a config, in place.

    A resolved config has no references, so it can be resolved, dumped and read again.

    Args:
        cfg: The config, with everything merged.
        options (Iterable[str]): Keys that the command line set.

    Returns:
        The same config.

    Raises:
        UsageError: If a reference names no top-level key, or the command line sets a shared key
            that nothing refers to.
    """
    # MMEngine's Config is no dict
    leaves = list(_leaves(dict(cfg.items()), ''))
    found = [key for _, value in leaves for key in _references(value)]
    for key in options:
        if key in SHARED_KEYS and key not in found:
            places = [place for place, _ in leaves if place.endswith(f'.{key}')]
            raise UsageError(
                f"--cfg-options {key}=...: expected a config that refers to '${{{key}}}', found one"
                f' that does not (a dump of a run holds plain values); set each place instead'
                f'{": " if places else ""}{", ".join(places)}'
            )
    for key in list(cfg):
        cfg[key] = _resolved(cfg[key], cfg, key)
    return cfg


def _references(value: Any) -> list[str]:
    return REFERENCE.findall(value) if isinstance(value, str) else []


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and sequences that is neither, with the keys that lead to it."""
    if isinstance(value, MutableMapping):
        children: Iterable = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    else:
        yield place, value
        return
    for key, child in children:
        yield from _leaves(child, f'{place}.{key}' if place else str(key))


def _resolved(value: Any, cfg: MutableMapping, place: str) -> Any:
    if isinstance(value, MutableMapping):
        for key in list(value):
            value[key] = _resolved(value[key], cfg, f'{place}.{key}')
        return value
    if isinstance(value, list | tuple):
        return type(value)(_resolved(v, cfg, f'{place}.{i}') for i, v in enumerate(value))
    for key in _references(value):
        if value != f'${{{key}}}':
            raise UsageError(
                f"{place}: expected '${{{key}}}' alone, found {value!r}; give the whole value a key"
                ' of its own'
            )
        if key not in cfg:
            raise UsageError(
                f'{place}={value!r}: expected a top-level key {key} in the config, found'
                f' {sorted(cfg)}; set {key}, or write the value here'
            )
        if _references(cfg[key]):
            raise UsageError(
                f'{key}: expected a value, found another reference {cfg[key]!r}; write the value'
            )
        return copy.deepcopy(cfg[key])
    return value
