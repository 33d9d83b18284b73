# Copyright (c) mmfgm authors.
"""Features of the repeated blocks of a stock transformer."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mmfgm.errors import UsageError

from ..recomputation import choose_recomputed, recomputed


def recompute(transformer: Any, checkpointing: bool | float | str) -> None:
    """Have a stock transformer compute its blocks, or some, again in the backward pass; see
    :func:`~mmfgm.models.recomputation.choose_recomputed`."""
    if checkpointing:
        lists = [part for part in transformer.children() if isinstance(part, nn.ModuleList)]
        choose_recomputed([block for blocks in lists for block in blocks], checkpointing)
        transformer.enable_gradient_checkpointing(recomputed)


def check_layer(transformer: nn.Module, attributes: Sequence[str], layer: int) -> None:
    """Raise a UsageError unless there is a block of that number, counted from 1, in the
    ``ModuleList`` attributes of a transformer."""
    layers = sum(len(getattr(transformer, name)) for name in attributes)
    if not 1 <= layer <= layers:
        raise UsageError(
            f'feature_layer={layer} is out of range: this network has the layers 1 to {layers}'
        )


def features(
    transformer: nn.Module,
    attributes: Sequence[str],
    feature_layer: int | Sequence[int],
    inputs: dict[str, Any],
    to_map: Callable[[Any], Tensor],
) -> Tensor | list[Tensor]:
    """What one block, or each of several, returns when a transformer is called; those after the
    last of them are not run.

    Args:
        transformer (nn.Module): Whose ``forward`` runs all its blocks.
        attributes (Sequence[str]): Its ``ModuleList`` of them, or several in their order.
        feature_layer (int | Sequence[int]): Numbers of blocks, counted from 1.
        inputs (dict[str, Any]): Of the transformer.
        to_map (Callable): What a block returns to a map ``(N, D, h / p, w / p)``.

    Raises:
        UsageError: If there is no such block.
    """
    layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    for layer in layers:
        check_layer(transformer, attributes, layer)
    lists = {name: getattr(transformer, name) for name in attributes}
    blocks = [block for blocks in lists.values() for block in blocks]
    kept: dict[int, Any] = {}

    def keep(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        kept[layer] = output

    handles = [blocks[layer - 1].register_forward_hook(partial(keep, layer)) for layer in layers]
    # the transformer runs the blocks that it finds under these names
    left = max(layers)
    for name, part in lists.items():
        setattr(transformer, name, part[:left])
        left = max(0, left - len(part))
    try:
        transformer(**inputs)
    finally:
        for name, part in lists.items():
            setattr(transformer, name, part)
        for handle in handles:
            handle.remove()
    maps = [to_map(kept[layer]) for layer in layers]
    return maps[0] if isinstance(feature_layer, int) else maps
