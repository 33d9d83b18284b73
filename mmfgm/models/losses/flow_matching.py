# Copyright (c) mmfgm authors.
from torch import Tensor


def flow_matching_loss(v: Tensor, target: Tensor) -> Tensor:
    """``|| v - (eps - x_0) ||^2`` of each sample (Eq. 3.6).

    Args:
        v (Tensor): Predicted velocity ``v(x_t, t)``, shape ``(N, *event)``.
        target (Tensor): Conditional velocity ``eps - x_0``, shape ``(N, *event)``.

    Returns:
        Tensor: Summed over the event dimensions, shape ``(N,)``.
    """
    return (v - target).square().flatten(1).sum(1)
