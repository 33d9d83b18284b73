# Copyright (c) mmfgm authors.
"""Values that a config writes once and every place that needs them refers to.

MMEngine evaluates the variables of a base file before ``--cfg-options`` and inheriting configs can
change them. A value ``'${latent_size}'`` stands for the top-level key ``latent_size`` after all
merging instead, so ``latent_size=64`` on a command line or in a downstream config reaches every
place.
"""

import ast
import copy
import re
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from mmfgm.errors import UsageError

# the top-level keys that our configs refer to
SHARED_KEYS = (
    'image_size',
    'latent_cache',
    'latent_size',
    'max_words',
    'num_classes',
    'pretrained',
    'prompt_cache',
    'world',
)
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
    values = list(leaves(dict(cfg.items()), ''))
    found = [key for _, value in values for key in _references(value)]
    for key in options:
        if key in SHARED_KEYS and key not in found:
            places = [place for place, _ in values if place.endswith(f'.{key}')]
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


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and sequences that is neither, with the keys that lead to it,
    joined by dots."""
    if isinstance(value, MutableMapping):
        children: Iterable = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    else:
        yield place, value
        return
    for key, child in children:
        yield from leaves(child, f'{place}.{key}' if place else str(key))


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


def parse_dump(text: str) -> dict[str, Any]:
    """The values of a config as MMEngine writes it into work dirs and checkpoints; nothing is run.

    Raises:
        ValueError, SyntaxError, TypeError, RecursionError, MemoryError: If it holds anything else
            than assignments of literals, lists, tuples, dicts and ``dict(...)``.
    """
    return {name: value for line in ast.parse(text).body for name, value in _assignment(line)}


def _assignment(line: ast.stmt) -> Iterator[tuple[str, Any]]:
    if not isinstance(line, ast.Assign) or len(line.targets) != 1:
        raise ValueError(f'line {line.lineno} is not an assignment')
    (target,) = line.targets
    if not isinstance(target, ast.Name):
        raise ValueError(f'line {line.lineno} assigns to something else than a name')
    yield target.id, _literal(line.value)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        # dict(a=1), and dict({'a b': 1}) for keys that are no names
        named = isinstance(node.func, ast.Name) and node.func.id == 'dict'
        if not named or len(node.args) > 1 or any(word.arg is None for word in node.keywords):
            raise ValueError(f'line {node.lineno} calls something')
        values = _literal(node.args[0]) if node.args else {}
        if not isinstance(values, dict):
            raise ValueError(f'line {node.lineno} makes a dict of something else')
        return {**values, **{word.arg: _literal(word.value) for word in node.keywords}}
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError(f'line {node.lineno} unpacks something')
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(_literal(value) for value in node.elts)
    return ast.literal_eval(node)
