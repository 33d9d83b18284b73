# Copyright (c) mmfgm authors.
"""Lumina-Image 2.0 against diffusers' own pipeline."""

from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance
from mmfgm.models.families import FAMILIES, Lumina2, find
from mmfgm.registry import TASK_UTILS
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
from tests.tiny_lumina2 import make_tiny_lumina2

CONFIG = 'configs/fgm/lumina2_1024.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_tiny_lumina2(tmp_path_factory.mktemp('lumina2') / 'base')


@pytest.fixture(scope='module')
def cache(folder, tmp_path_factory):
    return make_cache(folder, tmp_path_factory.mktemp('cache'))


def open_pipeline(folder):
    pipeline = Lumina2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, z, steps=8, **options):
    options = dict(guidance_scale=4.0, output_type='latent') | options
    return pipeline(PROMPTS, num_inference_steps=steps, latents=z, **options).images


def test_sampling_is_the_pipelines(folder):
    """8 Euler steps with guidance, renormalised by row or not, on a square and another size."""
    pipeline = open_pipeline(folder)
    times = find(folder).times(8)
    results = []
    for size, rescale in (((4, 4), True), ((4, 6), True), ((4, 6), False)):
        z = noise(4, *size)
        guidance = partial(ClassifierFreeGuidance, 4.0, rescale=(-1,) if rescale else False)
        results.append(integrate(folder, z, guidance, times))
        theirs = run(pipeline, z, cfg_normalization=rescale)
        torch.testing.assert_close(results[-1], theirs, rtol=1e-5, atol=1e-5)
    assert (results[1] - results[2]).abs().max() > 1e-3


@pytest.mark.parametrize('kind', ['exponential', 'linear'])
def test_times_of_a_dynamic_shift(tmp_path, kind):
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, base_shift=0.7, max_shift=1.3
    )
    folder = make_tiny_lumina2(tmp_path, scheduler=scheduler)
    family, pipeline = find(folder), open_pipeline(folder)
    run(pipeline, noise(4, 4, 4), 5)
    times = family.times(5, pretrained=folder)
    torch.testing.assert_close(times, pipeline.scheduler.sigmas)
    assert (times - family.times(5)).abs().max() > 0.1


def test_prompts_are_the_pipelines(folder):
    """With the system prompt before prompts, and without it before the empty one."""
    family = find(folder)
    embeds, mask, null, null_mask = open_pipeline(folder).encode_prompt(PROMPTS)
    cond = family.encode(folder, [PROMPTS[0], '', PROMPTS[1]])
    torch.testing.assert_close(cond['prompt_embeds'][::2], embeds)
    torch.testing.assert_close(cond['prompt_embeds'][1], null[0])
    assert torch.equal(cond['prompt_mask'][::2], mask.float())
    assert torch.equal(cond['prompt_mask'][1], null_mask[0].float())
    dummies = family.load(folder).dummy_conditions(3)
    assert {k: v.shape for k, v in dummies.items()} == {k: v.shape for k, v in cond.items()}


def test_prompts_that_are_too_long(folder):
    """Two prompts that differ beyond the limit are the same to the pipeline; the limit is exact."""
    encoder = find(folder).encoder(folder)
    most = 256 - encoder.count_tokens([encoder.prefix])[0]
    assert encoder.bad(['q' * most, 'q' * (most + 1), '']) == {
        1: f'has {most + 1} tokens, more than {most}',
        2: 'is empty',
    }
    last, beyond = (
        encoder.encode([text + 'x', text + 'y'])['prompt_embeds']
        for text in ('q' * (most - 1), 'q' * most)
    )
    assert not torch.equal(*last) and torch.equal(*beyond)


def test_prompts_through_the_cache(folder, cache):
    check_cache(folder, cache)


def test_one_cycle(folder, cache):
    check_cycle(folder, cache, feature_layer=1, rescale=(-1,))


def test_features(folder):
    """Image tokens stand behind each prompt's own."""
    network = find(folder).load(folder)
    cond = find(folder).encode(folder, PROMPTS)
    lengths = cond['prompt_mask'].sum(1).int().tolist()
    assert lengths[0] != lengths[1]

    def image_tokens(out):
        return torch.stack([row[n : n + 4] for row, n in zip(out, lengths)])

    check_features(network, cond, image_tokens, network.transformer.layers)


def test_latents_are_the_pipelines(folder):
    pipeline, family = open_pipeline(folder), find(folder)
    z = noise(4, 4, 6)
    decoder = TASK_UTILS.build(family.decoder(folder))
    images = decoder(run(pipeline, z, 2)) / 2 + 0.5
    torch.testing.assert_close(images.clamp(0, 1), run(pipeline, z, 2, output_type='pt'))
    encoder = family.latent_encoder(folder)
    assert (encoder.factor, encoder.channels) == (2, 4)
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    torch.testing.assert_close(decoder(encoder.encode(pixels)), expected)


def test_names(folder):
    check_names(find(folder).load(folder), FAMILIES['lumina2'])


def test_export(folder, tmp_path):
    check_export(folder, Lumina2Pipeline, tmp_path, 0.97, 0.8, CONFIG)


def test_bad_input(folder):
    network = find(folder).load(folder)
    with pytest.raises(UsageError, match='layers 1 to 2'):
        network(
            torch.zeros(1, 4, 4, 4), torch.ones(1), **network.dummy_conditions(1), feature_layer=3
        )
    with pytest.raises(UsageError, match='latent_size up to 16, .* found 18'):
        Lumina2(18, pretrained=folder)
    with pytest.raises(UsageError, match='Lumina2 takes either pretrained .* or config'):
        Lumina2(4)
    with pytest.raises(UsageError, match='max_length of Lumina-Image 2.0 from 2 to 299, found 300'):
        find(folder).encoder(folder, max_length=300)
