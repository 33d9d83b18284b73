# Copyright (c) mmfgm authors.
"""Pipelines as configs describe them: against diffusers' own calls, LoRA and PEFT against their
formulas."""

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    StableDiffusion3Pipeline,
)
from mmengine.config import Config
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval import DiffusersPipeline
from tests.conftest import ROOT
from tests.tiny_sd3 import make_tiny_sd3

CALL = dict(num_inference_steps=2, guidance_scale=7.0, height=16, width=16, max_sequence_length=32)
PROMPTS, SEEDS = ['a photo of a cat', 'a photo of two dogs', 'a red house'], [5, 6, 2**32 - 1]
LAYER = 'transformer_blocks.1.attn.to_q'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return make_tiny_sd3(tmp_path_factory.mktemp('sd3'))


@pytest.fixture(scope='module')
def adapters(model, tmp_path_factory):
    """One random LoRA of the transformer, as diffusers stores it and as PEFT does, and what it adds
    to a layer."""
    folder = tmp_path_factory.mktemp('lora')
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    adapted = get_peft_model(
        pipeline.transformer, LoraConfig(r=2, lora_alpha=4, target_modules=['to_q', 'to_k'])
    )
    for name, value in adapted.named_parameters():
        if 'lora_' in name:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    state = get_peft_model_state_dict(adapted)
    change = (
        4
        / 2
        * adapted.get_parameter(f'base_model.model.{LAYER}.lora_B.default.weight')
        @ adapted.get_parameter(f'base_model.model.{LAYER}.lora_A.default.weight')
    )
    adapted.save_pretrained(folder / 'peft')
    state = {name.removeprefix('base_model.model.'): value for name, value in state.items()}
    metadata = dict(r=2, lora_alpha=4, target_modules=['to_q', 'to_k'])
    StableDiffusion3Pipeline.save_lora_weights(
        folder / 'diffusers',
        state,
        weight_name='lora.safetensors',
        transformer_lora_adapter_metadata=metadata,
    )
    return folder, change.detach()


def build(model, **kwargs):
    return DiffusersPipeline(model, **{**dict(call=CALL, dtype='float32'), **kwargs}).load('cpu')


def weight(pipeline):
    return pipeline.network.get_parameter(f'{LAYER}.weight')


def test_images_are_diffusers_own_and_belong_to_their_seeds(model):
    pipeline = build(model)
    images = pipeline.generate(PROMPTS, SEEDS)
    assert pipeline.nfe == 2  # guidance doubles the batch, not the calls
    stock = StableDiffusion3Pipeline.from_pretrained(model)
    stock.set_progress_bar_config(disable=True)
    for prompt, seed, image in zip(PROMPTS, SEEDS, images):
        expected = stock(prompt, generator=torch.Generator().manual_seed(seed), **CALL).images[0]
        assert image.dtype == np.uint8 and image.shape == (16, 16, 3)
        assert np.abs(image.astype(int) - np.asarray(expected, dtype=int)).max() <= 1
    assert np.abs(images[0].astype(int) - images[1]).max() > 10


def test_noise_of_later_steps_belongs_to_the_seed_too(model):
    """As Flash-SD3 samples: without T5 and guidance, and with new noise at every step."""
    pipeline = build(
        model,
        load_args=dict(text_encoder_3=None, tokenizer_3=None),
        scheduler=dict(type='FlowMatchLCMScheduler'),
        call=dict(CALL, num_inference_steps=4, guidance_scale=0.0),
    )
    images = pipeline.generate(PROMPTS, SEEDS)
    assert pipeline.nfe == 4 and pipeline.pipeline.text_encoder_3 is None
    torch.manual_seed(1)
    order = [2, 0]
    again = pipeline.generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order])
    for i, image in zip(order, again):
        assert np.abs(image.astype(int) - images[i]).max() <= 1


def test_the_scheduler_takes_the_steps_of_flash_sd3():
    """``x <- sigma' eps + (1 - sigma') (x - sigma v)``, on the noise levels of SD3's own
    scheduler."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = FlowMatchLCMScheduler.from_config(own.config)
    own.set_timesteps(4)
    scheduler.set_timesteps(4)
    sigmas = own.sigmas.tolist()
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=1e-3) and sigmas[-1] == 0
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        v = x.sin()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        expected = scheduler.sigmas[i + 1] * noise + (1 - scheduler.sigmas[i + 1]) * (
            x - scheduler.sigmas[i] * v
        )
        x = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(i), return_dict=False)[
            0
        ]
        assert torch.allclose(x, expected, atol=1e-6)


def test_lora_at_a_scale_and_peft(model, adapters):
    folder, change = adapters
    plain = weight(build(model))
    lora = dict(pretrained=str(folder / 'diffusers'), weight_name='lora.safetensors', scale=0.125)
    fused, merged = build(model, lora=lora), build(model, peft=str(folder / 'peft'))
    assert torch.allclose(weight(fused), plain + 0.125 * change, atol=1e-6)
    assert torch.allclose(weight(merged), plain + change, atol=1e-6)
    # plain layers again, so that nothing is computed twice
    assert not [
        name
        for pipeline in (fused, merged)
        for name, _ in pipeline.network.named_modules()
        if 'lora' in name
    ]
    identities = [pipeline.identity for pipeline in (build(model), fused, merged)]
    assert len({identity['weights']['transformer'] for identity in identities}) == 3
    assert (
        identities[0] == build(model).identity
        and identities[0] != build(model, call=dict(CALL, guidance_scale=3.0)).identity
    )


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(dtype='half'), 'dtype must be one of float32, float16, bfloat16'),
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (
            dict(scheduler=dict(type='FlashFlowMatchEulerDiscreteScheduler')),
            'has no scheduler .FlashFlowMatch',
        ),
        (dict(lora=dict(weight_name='x')), 'must name a hub id or folder'),
        (dict(call=dict(CALL, steps=3)), 'StableDiffusion3Pipeline takes no steps'),
        (dict(lora=dict(pretrained='/nowhere/lora')), 'there is no folder'),
        (dict(peft='/nowhere/peft'), 'there is no folder'),
    ],
)
def test_bad_input(model, kwargs, message):
    with pytest.raises(UsageError, match=message):
        build(model, **kwargs)


def test_configs_are_the_papers_comparison():
    """Appendix B.2: resolution, steps, guidance, LoRA scale."""
    found = {}
    for name in ('sd3', 'hyper_sd3', 'flash_sd3', 'fgm_sd3'):
        pipeline = dict(Config.fromfile(ROOT / 'configs' / 'geneval' / f'{name}.py').pipeline)
        assert pipeline.pop('type') == 'DiffusersPipeline'
        built = DiffusersPipeline(**pipeline)  # loads nothing
        assert (built.call['height'], built.call['width']) == (1024, 1024)
        found[name] = (
            built.call['num_inference_steps'],
            built.call['guidance_scale'],
            (built.lora or {}).get('scale'),
        )
    assert found == dict(
        sd3=(28, 7.0, None),
        hyper_sd3=(4, 3.0, 0.125),
        flash_sd3=(4, 0.0, None),
        fgm_sd3=(1, 1.0, None),
    )
