# Copyright (c) mmfgm authors.
"""SANA against diffusers' own pipeline."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
)

from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance
from mmfgm.models.families import FAMILIES, PipelineStep, Sana, find
from tests.family_checks import (
    PROMPTS,
    check_cache,
    check_cycle,
    check_export,
    check_features,
    check_names,
    integrate,
    make_cache,
    noise,
)
from tests.tiny_sana import make_tiny_sana

CONFIG = 'configs/fgm/sana_1024.py'
GUIDANCE = partial(ClassifierFreeGuidance, 4.5)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    # of published models, the largest and SANA-1.5 scale time, and 1.5 normalises queries and keys
    return make_tiny_sana(
        tmp_path_factory.mktemp('sana') / 'base',
        timestep_scale=0.5,
        qk_norm='rms_norm_across_heads',
    )


@pytest.fixture(scope='module')
def cache(folder, tmp_path_factory):
    return make_cache(folder, tmp_path_factory.mktemp('cache'))


@pytest.fixture()
def pipeline(folder):
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, z, steps=8, **options):
    # the sizes of its bins are those of published models
    options = dict(
        guidance_scale=4.5, use_resolution_binning=False, output_type='latent', **options
    )
    return pipeline(PROMPTS, num_inference_steps=steps, latents=z, **options).images


@pytest.mark.parametrize('config', [{}, dict(patch_size=2), dict(interpolation_scale=1.5)])
def test_sampling_is_the_pipelines(tmp_path, config):
    """8 Euler steps with guidance, on a square and another size."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    folder = make_tiny_sana(tmp_path, scheduler=scheduler, timestep_scale=0.5, **config)
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for size in ((4, 4), (4, 6)):
        z = noise(4, *size)
        ours = integrate(folder, z, GUIDANCE, find(folder).times(8))
        torch.testing.assert_close(ours, run(pipeline, z), rtol=1e-5, atol=1e-5)


def test_the_published_scheduler_differs_by_rounded_times(folder, pipeline):
    """DPM-Solver++ of order 1 is Euler's method, on its own grid, and the network sees whole
    thousandths of time."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, solver_order=1
    )
    z = noise(4, 4, 4)
    theirs = run(pipeline, z)
    times = pipeline.scheduler.sigmas

    def rounded(null):
        guide = GUIDANCE(null)
        return lambda network, x, t, cond: guide(network, x, (1000 * t).floor() / 1000, cond)

    torch.testing.assert_close(integrate(folder, z, rounded, times), theirs, rtol=1e-4, atol=1e-4)


def test_prompts_are_the_pipelines(folder, pipeline, monkeypatch):
    """With the instruction before prompts, and without it before the empty one."""
    encoded = []
    encode_prompt = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline,
        'encode_prompt',
        lambda *a, **k: encoded.append(encode_prompt(*a, **k)) or encoded[0],
    )
    run(pipeline, noise(4, 4, 4), 1)
    embeds, mask, null, null_mask = encoded[0]
    family = find(folder)
    cond = family.encode(folder, [PROMPTS[0], '', PROMPTS[1]])
    torch.testing.assert_close(cond['prompt_embeds'][::2], embeds)
    torch.testing.assert_close(cond['prompt_embeds'][1], null[0])
    assert torch.equal(cond['prompt_mask'][::2], mask.float())
    assert torch.equal(cond['prompt_mask'][1], null_mask[0].float())
    dummies = family.load(folder).dummy_conditions(3)
    assert {k: v.shape for k, v in dummies.items()} == {k: v.shape for k, v in cond.items()}


def test_prompts_that_are_too_long(folder):
    """Two prompts that differ beyond the limit are the same to the pipeline; the limit is exact."""
    encoder = find(folder).encoder(folder, max_length=20)
    assert encoder.bad(['q' * 18, 'q' * 19, ' ', 'Q' * 18 + ' ']) == {
        1: 'has 19 tokens, more than 18',
        2: 'is empty',
    }
    last, beyond = (
        encoder.encode([text + 'x', text + 'y'])['prompt_embeds'] for text in ('q' * 17, 'q' * 18)
    )
    assert not torch.equal(*last) and torch.equal(*beyond)


def test_prompts_through_the_cache(folder, cache):
    check_cache(folder, cache)


def test_one_cycle(folder, cache):
    check_cycle(folder, cache, feature_layer=1)


def test_features(folder):
    network = find(folder).load(folder)
    cond = find(folder).encode(folder, PROMPTS)
    check_features(network, cond, lambda out: out, network.transformer.transformer_blocks)


def test_latents_are_the_pipelines(folder, pipeline):
    from mmfgm.registry import TASK_UTILS

    family = find(folder)
    z = noise(4, 4, 6)
    images = run(pipeline, z, 2)
    decoder = TASK_UTILS.build(family.decoder(folder))
    options = dict(guidance_scale=4.5, use_resolution_binning=False, output_type='pt')
    expected = pipeline(PROMPTS, num_inference_steps=2, latents=z, **options).images
    torch.testing.assert_close((decoder(images) / 2 + 0.5).clamp(0, 1), expected)
    encoder = family.latent_encoder(folder)
    assert (encoder.factor, encoder.channels) == (2, 4)
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = encoder.encode(pixels)
    vae = pipeline.vae
    with torch.no_grad():
        torch.testing.assert_close(latents / vae.config.scaling_factor, vae.encode(pixels).latent)
        torch.testing.assert_close(decoder(latents), vae.decode(vae.encode(pixels).latent).sample)


def test_names(folder):
    check_names(find(folder).load(folder), FAMILIES['sana'])


@pytest.mark.parametrize('scheduler', ['dpm', 'euler'])
def test_export(tmp_path, scheduler):
    made = None if scheduler == 'dpm' else FlowMatchEulerDiscreteScheduler(shift=3.0)
    folder = make_tiny_sana(tmp_path / 'base', scheduler=made, timestep_scale=0.5)
    check_export(folder, SanaPipeline, tmp_path, 0.97, 0.8, CONFIG, use_resolution_binning=False)


def test_bad_input(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'sprint')
    index = json.loads((tmp_path / 'sprint' / 'model_index.json').read_text())
    for name, message in (
        ('SanaSprintPipeline', 'SANA-Sprint is not a flow-matching teacher.*name the SANA'),
        ('SanaVideoPipeline', 'is a SanaVideoPipeline, expected'),
    ):
        (tmp_path / 'sprint' / 'model_index.json').write_text(
            json.dumps({**index, '_class_name': name})
        )
        with pytest.raises(UsageError, match=message):
            find(str(tmp_path / 'sprint'))
    (tmp_path / 'sprint' / 'model_index.json').write_text(json.dumps({**index, 'tokenizer': None}))
    with pytest.raises(UsageError, match='has no tokenizer'):
        find(folder).encoder(str(tmp_path / 'sprint'))
    with pytest.raises(UsageError, match='SANA-Sprint is not a flow-matching teacher'):
        Sana(config=dict(guidance_embeds=True, num_layers=1, num_attention_heads=2))
    with pytest.raises(UsageError, match='multiple of the patch size 2, found 3'):
        Sana(3, config=dict(patch_size=2, num_layers=1, num_attention_heads=2))
    with pytest.raises(UsageError, match='either pretrained .* or config'):
        Sana()
    with pytest.raises(UsageError, match='layers 1 to 2'):
        network = find(folder).load(folder)
        network(
            torch.zeros(1, 4, 4, 4), torch.ones(1), **network.dummy_conditions(1), feature_layer=3
        )
    with pytest.raises(UsageError, match='max_length of SANA from 2 to 4096, found 1'):
        find(folder).encoder(folder, max_length=1)
    with pytest.raises(
        UsageError, match='encoder of SANA, which are max_length, dtype, found without_t5'
    ):
        find(folder).encoder(folder, without_t5=True)
    with pytest.raises(UsageError, match='has a EulerDiscreteScheduler, expected its FlowMatch'):
        PipelineStep.of(EulerDiscreteScheduler())
