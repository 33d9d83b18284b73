# Copyright (c) mmfgm authors.
"""Activations that are computed again in the backward pass instead of being kept: of all blocks, of
a share of them, or all but attention."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mmfgm.errors import UsageError

from .lora import active_adapters

ATTENTION = 'attention'
# what every fused attention of torch is called, on any device
FUSED_ATTENTION = ('_scaled_dot_product_', '_flash_attention', '_efficient_attention')


def choose_recomputed(blocks: Sequence[nn.Module], checkpointing: bool | float | str) -> None:
    """Say which blocks :func:`recomputed` computes again.

    Args:
        blocks (Sequence[nn.Module]): In the order in which they run.
        checkpointing (bool | float | str): All or none; a share of them, spread evenly; or
            ``'attention'``, all, of which the outputs of attention are kept.

    Raises:
        UsageError: If it is none of these.
    """
    share = 1.0 if checkpointing == ATTENTION else checkpointing
    if isinstance(share, str) or not 0 <= share <= 1:
        raise UsageError(
            f"expected checkpointing to be True, False, a share in [0, 1] or 'attention', found"
            f' {checkpointing!r}; use for example 0.5 to recompute every second block'
        )
    block: Any  # flags, which a Module would take for tensors
    for i, block in enumerate(blocks):
        # a share of n blocks is floor(n share), the last of each stretch
        chosen = int((i + 1) * share) > int(i * share)
        block.recomputation = chosen
        block.keeps_attention = chosen and checkpointing == ATTENTION


def recomputed(block: Callable, *args: Any) -> Any:
    """``block(*args)``, computed again in the backward pass, under the adapters that are on now;
    unless :func:`choose_recomputed` left it out."""
    if not getattr(block, 'recomputation', True):
        return block(*args)
    network, keeps = active_adapters(), getattr(block, 'keeps_attention', False)
    # a compiled graph recomputes itself, and knows nothing of contexts
    if torch.compiler.is_compiling() or (network is None and not keeps):
        return checkpoint(block, *args, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        first, again = (
            create_selective_checkpoint_contexts(_keep_attention)
            if keeps
            else (nullcontext(), nullcontext())
        )
        return first, again if network is None else _nested(network.active(), again)

    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator).split('.')[1]
    if name.startswith(FUSED_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _nested(*contexts: AbstractContextManager) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
