# Copyright (c) mmfgm authors.
"""A teacher sampled as its stock pipeline samples it."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mmfgm.errors import UsageError
from mmfgm.models import Sampling
from mmfgm.models.families import find
from mmfgm.models.networks import AdaLNMLP
from mmfgm.models.sampling import Sampler
from tests.family_checks import PROMPTS, TINY
from tests.tiny_sana import make_tiny_sana

SEEDS = [3, 4]
SCALE = 3.0


# FLUX.1 and FLUX.2 are in their own files, with what their pipelines do to latents at the end
@pytest.mark.parametrize('kind', [kind for kind in TINY if not kind.startswith('flux')])
def test_it_makes_the_pipelines_latents(kind, tmp_path):
    # SANA's own solver is not Euler's
    euler = dict(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    folder = make_tiny_sana(tmp_path, **euler) if kind == 'sana' else TINY[kind](tmp_path)
    family = find(folder)
    # those that do not say a size are made for 1024 pixels
    size = dict(latent_size=8) if kind in ('qwen_image', 'z_image') else {}
    network, encoder = family.load(folder, **size).eval(), family.encoder(folder)
    pipeline = family.pipeline_type().from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    guided = family.stock_scale(pipeline) is not None
    null = family.null(encoder)
    sampler = Sampler(
        dict(teacher=network),
        network.event_shape,
        {},
        null=lambda cond: {name: value.expand_as(cond[name]) for name, value in null.items()},
    )
    batch = dict(idx=torch.arange(2), seed=SEEDS, cond=encoder.encode(PROMPTS))
    scale = SCALE if guided else None
    sampling = Sampling('teacher', 6, spacing='pipeline', guidance=scale)
    ours = sampler.sample(batch, sampling)
    z = sampler.noise(SEEDS)
    with torch.no_grad():
        theirs = pipeline(
            PROMPTS,
            latents=family.to_stock(z),
            num_inference_steps=6,
            output_type='latent',
            **family.stock_options(pipeline, network, scale, len(PROMPTS)),
        ).images
    expected = family.from_stock(theirs, z)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (sampler.sample(batch, replace(sampling, spacing='uniform')) - ours).abs().max() > 1e-3


def test_networks_without_a_pipeline():
    network = AdaLNMLP((2,), width=8)
    sampler = Sampler(dict(teacher=network), (2,), {})
    with pytest.raises(
        UsageError, match='found AdaLNMLP, which has no stock pipeline; use uniform'
    ):
        sampler.check(Sampling('teacher', 4, spacing='pipeline'))
    with pytest.raises(UsageError, match='no spacing of times .*edm or pipeline'):
        Sampling('teacher', spacing='flux')
