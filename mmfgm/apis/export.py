# Copyright (c) mmfgm authors.
"""A trained generator for people who do not train: a diffusers pipeline of SD3, or one file and its
description."""

import json
import os.path as osp
import shutil
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from safetensors.torch import save_file
from torch import nn

from mmfgm.errors import UsageError
from mmfgm.files import differences, whole_folder
from mmfgm.models import FGM, SD3, OneStepGenerator
from mmfgm.models.lora import has_adapters, merge_adapters
from mmfgm.models.networks.sd3 import diffusers_module
from mmfgm.models.text_encoders import check_sd3, load_or_explain
from mmfgm.registry import MODELS

from .artifacts import EXPORT_FILE, PIPELINE_FILE, WEIGHTS_FILE, check_checkpoint
from .card import describe_source, find_licence, hash_weights, licence_files, write_card
from .folding import PipelineStep, fold_generator
from .sampling_model import SamplingModel

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
LORA_FILE = 'pytorch_lora_weights.safetensors'


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
    """Export a trained one-step generator; the folder appears only when it is whole.

    The network chooses the kind. One of SD3 becomes a Stable Diffusion 3 pipeline in diffusers'
    format, in which only the transformer differs from the base (see :mod:`mmfgm.apis.folding`). Any
    other becomes ``generator.safetensors`` and ``mmfgm_export.json``, for
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
        max_shard_size (str): Of the transformer's files, as diffusers takes it. Defaults to
            ``'10GB'``.
        lora (bool): Of a generator trained with LoRA, export the adapters alone, for diffusers'
            ``load_lora_weights``.
        force (bool): Replace ``out`` if it is an export.

    Returns:
        str: What was made: ``'pipeline'``, ``'lora'`` or ``'generator'``.

    Raises:
        UsageError: If something does not fit, cannot be folded, or cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f'dtype must be one of {list(DTYPES)}, but is {dtype!r}')
    check_checkpoint(checkpoint)
    model = cfg.get('model') or {}
    kind, part = (
        MODELS.get(str(model.get('type'))),
        MODELS.get(str(model.get('network', {}).get('type'))),
    )
    if kind is None or not issubclass(kind, FGM) or part is None:
        raise UsageError(
            f'model.type is {model.get("type")!r}; only generators that FGM trains are exported:'
            ' give the config of the distillation, of configs/fgm'
        )
    base = base or model['network'].get('pretrained')
    sd3 = issubclass(part, SD3)
    if base and not sd3:
        raise UsageError(
            f'a network of type {model["network"]["type"]} is no part of {base!r}, and is exported'
            ' without a base; leave --base out'
        )
    if lora and not (sd3 and base and model.get('lora')):
        raise UsageError(
            'a LoRA file comes from a training with model.lora of a pre-trained SD3; leave'
            ' --lora out'
        )
    with (
        whole_folder(out, force, EXPORT_FILE) as folder,
        DefaultScope.overwrite_default_scope('mmfgm'),
    ):
        if sd3 and base:
            # before gigabytes are read
            index = check_sd3(base)
            local = _base_folder(base, index)
            step = PipelineStep.of(_scheduler(local, index))
            step.check(_bare(model))
            if lora:
                _check_lora(model, base, step)
        # neither the decoder nor guidance is needed
        trained = SamplingModel(
            {key: value for key, value in model.items() if key not in ('decoder', 'guidance')},
            checkpoint,
        )
        name = network or trained.available[0]
        if name not in trained.one_step:
            raise UsageError(
                f'{name!r} is no generator of this checkpoint; choose from {list(trained.one_step)}'
            )
        trained.load(name)
        generator = getattr(trained, name)
        source = describe_source(cfg, checkpoint, name)
        if lora:
            made, about = 'lora', _write_lora(folder, generator, base, local, dtype, source)
        elif sd3 and base:
            made, about = (
                'pipeline',
                _write_pipeline(
                    folder, generator, base, local, index, step, dtype, max_shard_size, source
                ),
            )
        else:
            made, about = 'generator', _write_generator(folder, generator, cfg, dtype, source)
        _write_text(
            osp.join(folder, EXPORT_FILE),
            json.dumps(
                dict(format=1, kind=made, network=name, dtype=dtype, **about, source=source),
                indent=2,
            )
            + '\n',
        )
    return made


def _write_text(path: str, text: str) -> None:
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)


def _base_folder(base: str, index: dict[str, Any]) -> str:
    """Where the base lies, downloaded if it is a hub id; with all parts that its index names."""
    from diffusers import StableDiffusion3Pipeline
    from huggingface_hub import snapshot_download

    local = base
    if not osp.isdir(base):
        local = load_or_explain(lambda: StableDiffusion3Pipeline.download(base), base)
        # into the same folder; the pipeline does not ask for them
        load_or_explain(
            lambda: snapshot_download(base, allow_patterns=['README.md', 'LICENSE*']), base
        )
    missing = [name for name in _parts(index) if not osp.isdir(osp.join(local, name))]
    if missing:
        raise UsageError(
            f'{base!r} is not whole: {", ".join(missing)} is missing; download all of it, with hf'
            ' download OWNER/NAME --local-dir FOLDER'
        )
    return local


def _parts(index: dict[str, Any]) -> list[str]:
    return [name for name, part in index.items() if isinstance(part, (list, tuple)) and part[0]]


def _scheduler(base: str, index: dict[str, Any]) -> Any:
    cls = getattr(diffusers_module(), index['scheduler'][1])
    return load_or_explain(lambda: cls.from_pretrained(base, subfolder='scheduler'), base)


def _bare(model: dict) -> OneStepGenerator:
    """The generator's coefficients, without its network."""
    return OneStepGenerator(nn.Identity(), **(model.get('generator') or {}))


def _check_lora(model: dict, base: str, step: PipelineStep) -> None:
    generator = _bare(model)
    if not step.is_generator(generator):
        raise UsageError(
            'adapters alone cannot hold what is folded into other weights:'
            f' t_star={generator.t_star}, c_in={generator.c_in}, '
            f"c_out={generator.c_out}, c_skip={generator.c_skip}, and the pipeline's step has 1.0"
            ' for each; leave --lora out to '
            'export the merged transformer'
        )
    if model['teacher'].get('checkpoint') is not None:
        raise UsageError(
            f'the adapters belong to the teacher of {model["teacher"]["checkpoint"]!r}, not to'
            f' {base!r}; leave --lora out to export the merged transformer'
        )


def _merged(generator: OneStepGenerator) -> OneStepGenerator:
    """Without adapters, which are added in float32 at least."""
    return merge_adapters(generator.float()) if has_adapters(generator) else generator


def _write_pipeline(
    folder: str,
    generator: OneStepGenerator,
    base: str,
    local: str,
    index: dict[str, Any],
    step: PipelineStep,
    dtype: str,
    max_shard_size: str,
    source: dict[str, Any],
) -> dict[str, Any]:
    expected = load_or_explain(
        lambda: type(generator.network.transformer).load_config(local, subfolder='transformer'),
        base,
    )
    latent_size, config = (
        generator.network.event_shape[-1],
        dict(generator.network.transformer.config),
    )
    same = [key for key in config if not key.startswith('_') and key != 'sample_size']
    differs = list(
        differences(
            {key: _plain(expected.get(key)) for key in same},
            {key: _plain(config[key]) for key in same},
        )
    )
    if differs:
        raise UsageError(
            f'the network is of another architecture than the transformer of {base!r}:'
            f' {"; ".join(differs[:4])}; name the base that it was distilled from'
        )
    trained_in = generator.network.transformer.proj_out.weight.dtype
    transformer = fold_generator(_merged(generator), step, DTYPES[dtype], trained_in)
    # the size of images that the pipeline makes unless told otherwise
    transformer.register_to_config(sample_size=latent_size)
    try:
        transformer.save_pretrained(osp.join(folder, 'transformer'), max_shard_size=max_shard_size)
    except ValueError as e:
        raise UsageError(
            f'max_shard_size={max_shard_size!r} is not understood ({e}); write 5GB or 500MB'
        ) from e
    config_file = osp.join(folder, 'transformer', 'config.json')
    with open(config_file) as f:
        config = json.load(f)
    config.pop('_name_or_path', None)  # a folder that others do not have
    _write_text(config_file, json.dumps(config, indent=2, sort_keys=True) + '\n')
    for name in _parts(index):
        if name != 'transformer':
            shutil.copytree(osp.join(local, name), osp.join(folder, name))
    for file in [osp.join(local, PIPELINE_FILE), *licence_files(local)]:
        shutil.copy(file, folder)
    torch_dtype = str(DTYPES[dtype])
    usage = f"""
import torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained('THIS FOLDER', torch_dtype={torch_dtype}).to('cuda')
image = pipe('a red cat', num_inference_steps=1, guidance_scale=1.0).images[0]
image.save('image.png')
"""
    weights = hash_weights(osp.join(folder, 'transformer'))
    _write_text(
        osp.join(folder, 'README.md'),
        write_card(usage, source, weights, dtype, _public(base), find_licence(local)),
    )
    network = dict(type='SD3', latent_size=latent_size)
    return dict(
        model=dict(
            type='FGM',
            network=network,
            generator=dict(t_star=step.timestep / 1000, c_out=step.scale),
        ),
        weights_sha256=weights,
    )


def _write_lora(
    folder: str,
    generator: OneStepGenerator,
    base: str,
    local: str,
    dtype: str,
    source: dict[str, Any],
) -> dict[str, Any]:
    from diffusers import StableDiffusion3Pipeline

    layers, tensors = dict(generator.network.named_modules()), {}
    for name, p in generator.network.named_parameters():
        if p.requires_grad:
            layer, matrix, adapter, _ = name.rsplit('.', 3)
            # readers take alpha for the rank, so its ratio goes into one of the matrices
            scale = layers[layer].scaling[adapter] if matrix == 'lora_B' else 1.0
            tensors[f'{layer.removeprefix("transformer.")}.{matrix}.weight'] = (
                p.detach() * scale
            ).to(DTYPES[dtype])
    StableDiffusion3Pipeline.save_lora_weights(
        folder, transformer_lora_layers=tensors, weight_name=LORA_FILE
    )
    usage = f"""
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained({_public(base)!r}).to('cuda')
pipe.load_lora_weights('THIS FOLDER')
image = pipe('a red cat', num_inference_steps=1, guidance_scale=1.0).images[0]
image.save('image.png')
"""
    weights = hash_weights(folder)
    for file in licence_files(local):
        shutil.copy(file, folder)
    _write_text(
        osp.join(folder, 'README.md'),
        write_card(usage, source, weights, dtype, _public(base), find_licence(local)),
    )
    return dict(
        model=dict(
            type='FGM', network=dict(type='SD3', latent_size=generator.network.event_shape[-1])
        ),
        weights_sha256=weights,
    )


def _write_generator(
    folder: str, generator: OneStepGenerator, cfg: Config, dtype: str, source: dict[str, Any]
) -> dict[str, Any]:
    tensors = {
        key: (value.to(DTYPES[dtype]) if value.is_floating_point() else value).contiguous()
        for key, value in _merged(generator).state_dict().items()
    }
    save_file(tensors, osp.join(folder, WEIGHTS_FILE), dict(format='pt'))
    classes, prompts = getattr(generator.network, 'num_classes', None), cfg.get('text_encoder')
    inputs = "'A PROMPT'" if prompts else '[0, 1, 2, 3]' if classes else '4'
    name = 'prompt' if prompts else 'labels' if classes else 'num_images'
    usage = f"""
from mmfgm.apis import OneStepPipeline
pipe = OneStepPipeline.from_pretrained('THIS FOLDER')
image = pipe({name}={inputs}, seeds=0).images[0]
image.save('image.png')
"""
    weights = hash_weights(folder)
    _write_text(osp.join(folder, 'README.md'), write_card(usage, source, weights, dtype))
    model = {
        key: cfg.model[key].to_dict()
        for key in ('network', 'generator', 'decoder')
        if cfg.model.get(key)
    }
    return dict(
        model=dict(type='FGM', **model),
        text_encoder=prompts.to_dict() if prompts else None,
        weights_sha256=weights,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _public(base: str) -> str:
    """A hub id as it is, but of a folder only its name: others do not have it where we do."""
    return base if not osp.isdir(base) else osp.basename(osp.abspath(base))
