# Copyright (c) mmfgm authors.
"""The config names of what knows no registry itself; imported when a config's first part is built.

``mmfgm.flow``, the losses and the generators are plain torch, so that they serve other trainers
too. Everything else registers itself where it is defined.
"""

from typing import Any

from mmfgm.flow import (
    Beta,
    ClassifierFreeGuidance,
    EDMGrid,
    LogitNormal,
    NullLabel,
    Uniform,
    euler,
    heun,
)
from mmfgm.registry import FUNCTIONS, MODELS, TASK_UTILS

from .generators import DataSpaceGenerator, FewStepGenerator, OneStepGenerator
from .losses import (
    DiffInstructLoss,
    DMDLoss,
    FGMLoss,
    FlowMatchingLoss,
    RealUIDLoss,
    RealUIDOnlineLoss,
    VelocityConsistencyLoss,
)

for part in (Beta, EDMGrid, LogitNormal, Uniform, NullLabel):
    TASK_UTILS.register_module(module=part)
for solver in (euler, heun):
    FUNCTIONS.register_module(module=solver)
for module in (
    DMDLoss,
    DiffInstructLoss,
    FGMLoss,
    DataSpaceGenerator,
    FewStepGenerator,
    FlowMatchingLoss,
    OneStepGenerator,
    RealUIDLoss,
    RealUIDOnlineLoss,
    VelocityConsistencyLoss,
):
    MODELS.register_module(module=module)


@TASK_UTILS.register_module(name='ClassifierFreeGuidance')
def build_guidance(scale: float, null: dict, **options: Any) -> ClassifierFreeGuidance:
    """Build guidance from a config in which ``null`` is a config too."""
    return ClassifierFreeGuidance(scale, TASK_UTILS.build(null), **options)
