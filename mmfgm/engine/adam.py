# Copyright (c) mmfgm authors.
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from mmfgm.errors import UsageError
from mmfgm.processes import local
from mmfgm.registry import OPTIMIZERS


def _check_betas(betas: tuple[float, float]) -> None:
    if betas[0] != 0 or not 0 <= betas[1] < 1:
        raise UsageError(
            'MomentumFreeAdam is Adam with betas=(0.0, beta2), beta2 in [0, 1), but betas is'
            f" {tuple(betas)}; use torch's Adam for a beta1 that is not 0"
        )


def _count(step: Tensor) -> float:
    """Steps taken. A rehearsal's tensors have no values; there it is the first."""
    return 1.0 if isinstance(step, FakeTensor) else step.item()


@OPTIMIZERS.register_module()
class MomentumFreeAdam(Optimizer):
    """``torch.optim.Adam(betas=(0.0, beta2))`` in half of its memory: the same updates, without the
    first moment.

    With ``beta1 = 0`` Adam's ``exp_avg`` is the gradient of this step, so the state is
    ``exp_avg_sq`` and the step count. Sharded parameters are updated shard by shard. It takes over
    a run of torch's Adam.

    Args:
        params: Parameters or groups, as of any optimizer.
        lr (float): Defaults to 1e-3.
        betas (tuple[float, float]): ``(0.0, beta2)``. Defaults to ``(0.0, 0.999)``.
        eps (float): Added to the root of the second moment. Defaults to 1e-8.
        weight_decay (float): L2 penalty, added to the gradient as in torch's Adam. Defaults to 0.

    Raises:
        UsageError: If ``beta1`` is not 0, or another setting is out of range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
    ):
        _check_betas(betas)
        for name, value in dict(lr=lr, eps=eps, weight_decay=weight_decay).items():
            if not value >= 0:
                raise UsageError(f'{name} of MomentumFreeAdam must be at least 0, but is {value}')
        super().__init__(
            params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state, or that of torch's Adam.

        Raises:
            UsageError: If the state is of an Adam with a ``beta1`` that is not 0.
        """
        for group in state_dict['param_groups']:
            _check_betas(group['betas'])
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.pop('exp_avg', None)
            # fused Adam keeps it on the GPU, where reading it would wait
            state['step'] = state['step'].cpu()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple, list[torch.nn.Parameter]] = defaultdict(list)
            for p in group['params']:
                if p.grad is not None:
                    alike[p.device, p.dtype].append(p)
            for params in alike.values():
                self._update(
                    params, **{key: group[key] for key in ('lr', 'betas', 'eps', 'weight_decay')}
                )
        return loss

    def _state(self, p: torch.nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            # on the CPU like torch's, where reading it is free
            state['step'] = torch.zeros((), dtype=torch.float32, device='cpu')
            state['exp_avg_sq'] = torch.zeros_like(p)
        return state

    def _update(
        self,
        params: list[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Parameters of one device and type, in the order of operations of torch's Adam."""
        states = [self._state(p) for p in params]
        torch._foreach_add_([state['step'] for state in states], 1.0)
        second = [local(state['exp_avg_sq']) for state in states]
        grads: Sequence[Tensor] = [local(p.grad) for p in params]
        params = [local(p) for p in params]
        if weight_decay:
            grads = torch._foreach_add(grads, params, alpha=weight_decay)
        torch._foreach_mul_(second, betas[1])
        torch._foreach_addcmul_(second, grads, grads, 1 - betas[1])
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(
            denominators, [(1 - betas[1] ** _count(state['step'])) ** 0.5 for state in states]
        )
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(params, grads, denominators, -lr)
