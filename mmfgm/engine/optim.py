# Copyright (c) mmfgm authors.
import copy
import difflib

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict
from mmengine.optim.optimizer.builder import register_transformers_optimizers
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mmfgm.errors import UsageError
from mmfgm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class NetworkOptimWrapper(OptimWrapper):
    """The optimizer of one network: steps once per update and keeps the gradient norm of that step.

    Accumulation belongs to the loop (``train_cfg.accumulation``), because one iteration of an
    alternating run is a whole cycle of updates.

    Args:
        optimizer (Optimizer): Built by the constructor.
        clip_grad (dict, optional): ``dict(max_norm=...)``: clips the L2 norm of all gradients
            together.

    Raises:
        UsageError: If ``clip_grad`` asks for anything else.
    """

    grad_norm: Tensor | None = None

    def __init__(self, optimizer, clip_grad: dict | None = None):
        super().__init__(optimizer)
        if clip_grad is not None and set(clip_grad) != {'max_norm'}:
            raise UsageError(f'clip_grad must be dict(max_norm=...), but is {dict(clip_grad)}')
        self.max_norm = clip_grad['max_norm'] if clip_grad else None

    def step(self, **kwargs) -> None:
        """Clip if configured, step, and keep the norm (before clipping) in ``grad_norm``, on the
        device."""
        params = [
            p
            for group in self.optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        ]
        norm = get_total_norm([p.grad for p in params])
        if self.max_norm is not None:
            clip_grads_with_norm_(params, self.max_norm, norm)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step(**kwargs)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PerNetworkConstructor:
    """Build ``optim_wrapper = dict(constructor='PerNetworkConstructor', NAME=dict(optimizer=...),
    ...)``.

    Each ``NAME`` is a network of the model; its wrapper may carry ``clip_grad`` and
    ``paramwise_cfg``. ``NAME=None`` leaves out what a base config names, such as the
    discriminator where ``model.gan=None``.

    Raises:
        UsageError: If the names are not exactly the networks that the model's phases train, or an
            optimizer's settings are not what torch takes.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        if paramwise_cfg is not None:
            raise UsageError(
                'paramwise_cfg belongs inside the entry of one network, e.g.'
                ' optim_wrapper.generator'
            )
        cfg = copy.deepcopy(optim_wrapper_cfg)
        cfg.pop('type', None)
        self.cfg = {name: entry for name, entry in cfg.items() if entry is not None}

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        trained = {name for phase in model.phases.values() for name in phase.trains}
        if sorted(self.cfg) != sorted(trained):
            raise UsageError(
                f'optim_wrapper must name the trained networks {sorted(trained)} of'
                f' {type(model).__name__}, but it names {list(self.cfg)}; give each of the former'
                ' an optimizer, and set the others to None'
            )
        return OptimWrapperDict(
            **{name: self._build(name, cfg, model) for name, cfg in self.cfg.items()}
        )

    @staticmethod
    def _build(name: str, cfg: dict, model: nn.Module) -> OptimWrapper:
        where = f'optim_wrapper.{name}'
        if 'accumulative_counts' in cfg:
            raise UsageError(
                f'{where}.accumulative_counts is not used here; set train_cfg.accumulation, which'
                ' counts micro-batches of every update'
            )
        optimizer = cfg.get('optimizer') or {}
        betas = optimizer.get('betas')
        if betas is not None and any(not isinstance(beta, float) for beta in betas):
            raise UsageError(
                f'{where}.optimizer.betas must be floats, but is {tuple(betas)}; write 0.0 instead'
                ' of 0'
            )
        if optimizer.get('type') == 'Adafactor' and 'Adafactor' not in OPTIMIZERS:
            # left out at start-up, see mmfgm/__init__.py
            register_transformers_optimizers()
        kind = optimizer.get('type')
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            if isinstance(kind, str) and registry.get(kind) is None:
                close = difflib.get_close_matches(kind, OPTIMIZERS.module_dict, 1) or ['Adam']
                raise UsageError(
                    f'{where}.optimizer.type is {kind!r}, which is no optimizer of torch or of the'
                    f' scope {registry.scope!r}; did you mean {close[0]!r}?'
                )
        cfg = dict(cfg)
        cfg.setdefault('type', NetworkOptimWrapper)
        wrapper = DefaultOptimWrapperConstructor(cfg, cfg.pop('paramwise_cfg', None))(
            getattr(model, name)
        )
        for group in wrapper.param_groups:
            group['params'] = [p for p in group['params'] if p.requires_grad]
        return wrapper
