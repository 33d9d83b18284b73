# Copyright (c) mmfgm authors.
"""A trained generator for people who do not train, one class for each kind of export."""

import json
import os.path as osp

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from mmfgm.config import resolve
from mmfgm.errors import UsageError
from mmfgm.files import seal, whole_folder
from mmfgm.models import FGM, DataSpaceGenerator, build_generator
from mmfgm.models.families import family_of
from mmfgm.registry import MODELS

from ..artifacts import EXPORT_FILE, SEAL, check_checkpoint
from ..card import describe_source
from ..sampling_model import SamplingModel
from .exporter import DTYPES, BaseExporter, Exporter, write_text
from .few_step import FewStepPipelineExporter
from .generator import GeneratorExporter
from .hub import HubRepository
from .lora import FewStepLoRAExporter, LoRAExporter
from .pipeline import PipelineExporter

__all__ = [
    'DTYPES',
    'BaseExporter',
    'Exporter',
    'FewStepPipelineExporter',
    'GeneratorExporter',
    'HubRepository',
    'LoRAExporter',
    'PipelineExporter',
    'choose_exporter',
    'export_generator',
]


def choose_exporter(
    cfg: Config,
    base: str | None = None,
    dtype: str = 'fp32',
    max_shard_size: str = '10GB',
    lora: bool = False,
) -> Exporter:
    """The exporter that fits a training; for the arguments see :func:`export_generator`.

    Raises:
        UsageError: If there is none, or the base is not there or does not fit.
    """
    if dtype not in DTYPES:
        raise UsageError(f'dtype must be one of {list(DTYPES)}, but is {dtype!r}')
    resolve(cfg)
    model = cfg.get('model') or {}
    named = str(model.get('network', {}).get('type'))
    kind = MODELS.get(str(model.get('type')))
    part = MODELS.get(named)
    if kind is None or not issubclass(kind, FGM) or part is None:
        raise UsageError(
            f'model.type is {model.get("type")!r}; only generators that FGM trains are exported:'
            ' give the config of the distillation, of configs/fgm'
        )
    family = family_of(part)
    generator = build_generator(model.get('generator'), nn.Identity())
    # no pipeline hands its network the last estimate
    folds = family is not None and family.folds and not isinstance(generator, DataSpaceGenerator)
    if base and not folds:
        raise UsageError(
            f'a network of type {named} is no part of {base!r}, and is exported without a base;'
            ' leave --base out'
        )
    base = base or model['network'].get('pretrained')
    if lora and not (folds and base and model.get('lora')):
        raise UsageError(
            'a LoRA file comes from a training with model.lora of a pre-trained network of a'
            ' family that exports pipelines; leave --lora out'
        )
    few = getattr(generator, 'max_nfe', 1) > 1
    if lora:
        return (FewStepLoRAExporter if few else LoRAExporter)(cfg, dtype, family, base)
    if folds and base and few:
        return FewStepPipelineExporter(cfg, dtype, family, base, max_shard_size=max_shard_size)
    if folds and base:
        return PipelineExporter(cfg, dtype, family, base, max_shard_size=max_shard_size)
    return GeneratorExporter(cfg, dtype, family)


def export_generator(
    cfg: Config,
    checkpoint: str,
    out: str,
    base: str | None = None,
    network: str | None = None,
    dtype: str = 'fp32',
    max_shard_size: str = '10GB',
    lora: bool = False,
    force: bool = False,
) -> str:
    """Export a trained generator; the folder appears only when it is whole.

    The network chooses the kind. One of a family that folds becomes a pipeline in diffusers' folder
    format, in which only the network differs from the base, and with several steps the scheduler.
    Any other becomes ``generator.safetensors`` and ``mmfgm_export.json``, for
    :class:`~mmfgm.apis.FGMInferencer` and :class:`~mmfgm.apis.OneStepPipeline`.

    Args:
        cfg (Config): Of the training.
        checkpoint (str): What the training saved; see :func:`mmfgm.models.read_state_dict`.
        out (str): The folder to make.
        base (str, optional): Hub id or folder of the pipeline whose other parts are taken. Defaults
            to ``model.network.pretrained``.
        network (str, optional): Which average of the generator, or ``'generator'``. Defaults to the
            first average.
        dtype (str): ``'fp32'``, ``'bf16'`` or ``'fp16'``. Defaults to ``'fp32'``.
        max_shard_size (str): Of the pipeline's files, as diffusers takes it. Defaults to
            ``'10GB'``.
        lora (bool): Of a generator trained with LoRA, export the adapters alone, for diffusers'
            ``load_lora_weights``; of several steps, the model card names scheduler and times.
        force (bool): Replace ``out`` if it is an export.

    Returns:
        str: What was made: ``'pipeline'``, ``'lora'`` or ``'generator'``.

    Raises:
        UsageError: If something does not fit, cannot be folded, or cannot be written.
    """
    check_checkpoint(checkpoint)
    with (
        whole_folder(out, force, EXPORT_FILE) as folder,
        DefaultScope.overwrite_default_scope('mmfgm'),
    ):
        # first, as what it finds wrong costs no reading of gigabytes
        exporter = choose_exporter(cfg, base, dtype, max_shard_size, lora)
        # neither the decoder nor guidance is needed
        model = {key: value for key, value in cfg.model.items() if key not in _UNUSED}
        trained = SamplingModel(model, checkpoint)
        name = network or trained.available[0]
        if name not in trained.generators:
            raise UsageError(
                f'{name!r} is no generator of this checkpoint; choose from'
                f' {list(trained.generators)}'
            )
        trained.load(name)
        source = describe_source(cfg, checkpoint, name)
        about = exporter.write(trained.networks[name], folder, source)
        description = dict(
            format=1, kind=exporter.kind, network=name, dtype=dtype, **about, source=source
        )
        write_text(
            osp.join(folder, EXPORT_FILE), json.dumps(seal(description, SEAL), indent=2) + '\n'
        )
    return exporter.kind


_UNUSED = ('decoder', 'guidance')
