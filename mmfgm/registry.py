# Copyright (c) mmfgm authors.
"""A child of every MMEngine registry that mmfgm adds to.

Keep this file free of anything that can fail: MMEngine swallows an ImportError raised from it.
"""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOG_PROCESSORS as MMENGINE_LOG_PROCESSORS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS as MMENGINE_OPTIMIZERS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import VISBACKENDS as MMENGINE_VISBACKENDS
from mmengine.registry import VISUALIZERS as MMENGINE_VISUALIZERS
from mmengine.registry import Registry

# Packages import their modules when a name of theirs is first used, so what registers itself is
# listed here: a registry imports its locations when a config's first part is built.
_DATASETS = [
    f'mmfgm.datasets.{name}'
    for name in ('base', 'cached', 'couplings', 'digits', 'fashion', 'images', 'shapes', 'toys')
]
_MODELS = [
    f'mmfgm.models.{name}'
    for name in (
        'registration',
        'consistency_fm',
        'discriminator',
        'fgm',
        'flow_matching',
        'families',
        'networks.adm_unet',
        'networks.edm_unet',
        'networks.edm_velocity',
        'networks.mlp',
        'networks.sit',
        'preprocessor',
    )
]
_METRICS = [
    f'mmfgm.evaluation.{name}'
    for name in (
        'classifier',
        'features',
        'fid',
        'metrics',
        'preference',
        'shapes',
        'geneval.colors',
        'geneval.metric',
        'geneval.detectors.mmdet_detector',
        'geneval.pipelines',
        'geneval.detectors.transformers_detector',
    )
]
_ENGINE = [
    f'mmfgm.engine.{name}' for name in ('adam', 'hooks', 'loops', 'optim', 'runner', 'strategies')
]

DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, locations=[*_DATASETS, 'mmfgm.evaluation.geneval.dataset']
)
DATA_SAMPLERS = Registry('data sampler', parent=MMENGINE_DATA_SAMPLERS, locations=_DATASETS)
MODELS = Registry('model', parent=MMENGINE_MODELS, locations=_MODELS)
METRICS = Registry('metric', parent=MMENGINE_METRICS, locations=_METRICS)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, locations=_ENGINE)
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, locations=_ENGINE)
RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, locations=_ENGINE)
STRATEGIES = Registry('strategy', parent=MMENGINE_STRATEGIES, locations=_ENGINE)
OPTIM_WRAPPERS = Registry('optim wrapper', parent=MMENGINE_OPTIM_WRAPPERS, locations=_ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    locations=_ENGINE,
)
OPTIMIZERS = Registry('optimizer', parent=MMENGINE_OPTIMIZERS, locations=_ENGINE)
PARAM_SCHEDULERS = Registry(
    'parameter scheduler', parent=MMENGINE_PARAM_SCHEDULERS, locations=_ENGINE
)
LOG_PROCESSORS = Registry('log processor', parent=MMENGINE_LOG_PROCESSORS, locations=_ENGINE)
VISUALIZERS = Registry('visualizer', parent=MMENGINE_VISUALIZERS, locations=_ENGINE)
VISBACKENDS = Registry('vis_backend', parent=MMENGINE_VISBACKENDS, locations=_ENGINE)
FUNCTIONS = Registry(
    'function',
    parent=MMENGINE_FUNCTIONS,
    locations=['mmfgm.models.registration', 'mmfgm.datasets.base'],
)
# time samplers, guidance, feature functions, canvases: small objects that configs name
TASK_UTILS = Registry(
    'task util',
    parent=MMENGINE_TASK_UTILS,
    locations=[*_MODELS, *_DATASETS, *_METRICS],
)
