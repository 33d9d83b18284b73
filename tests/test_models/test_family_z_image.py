# Copyright (c) mmfgm authors.
"""Z-Image's family against diffusers' own pipeline and transformer."""

import copy
import json

import pytest
import torch
from diffusers import ZImagePipeline
from mmengine.registry import DefaultScope
from safetensors.torch import load_file

from mmfgm.apis import FGMInferencer, export_generator, read_config
from mmfgm.apis.rehearsal import rehearse
from mmfgm.caches import CacheOptions, cache_prompts
from mmfgm.datasets import CachedPrompts
from mmfgm.engine import SingleDeviceStrategy
from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance, euler
from mmfgm.models import FGM, CachedNullPrompt, LatentDecoder
from mmfgm.models.families import FAMILIES, ZImage, ZImageTextEncoder, find
from mmfgm.models.lora import LoRA
from tests.conftest import ROOT
from tests.test_apis.conftest import make_problem
from tests.tiny_qwen import vary
from tests.tiny_z_image import CONFIG, make_tiny_z_image
from tests.without_mmfgm import images_without_mmfgm

PROMPTS = ['a red cat', 'the blue house on a green tree, photographed with a large lens', 'birds']
FAMILY = FAMILIES['z_image']
LENGTH = 96


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_tiny_z_image(tmp_path_factory.mktemp('z_image') / 'tiny')


@pytest.fixture(scope='module')
def pipeline(folder):
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope='module')
def encoder(folder):
    return FAMILY.encoder(folder, max_length=LENGTH)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        yield


def null_of(encoder):
    null = FAMILY.null(encoder)
    return lambda cond: {name: null[name].expand_as(cond[name]) for name in cond}


def stock(transformer, x_t, t, tokens):
    """Our velocity, of the pipeline's own call."""
    prediction = transformer(list(x_t.unsqueeze(2)), 1 - t, tokens, return_dict=False)[0]
    return -torch.stack(prediction).squeeze(2)


@pytest.mark.parametrize(
    'height, width, scale, truncation',
    [(64, 64, 4.0, 1.0), (64, 96, 4.0, 0.55), (48, 32, 0.0, 1.0)],
)
def test_sampling_is_the_pipelines(folder, pipeline, encoder, height, width, scale, truncation):
    """8 Euler steps from the same noise, prompts of different lengths."""
    z = torch.randn(3, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        list(PROMPTS),  # which it overwrites
        height=height,
        width=width,
        num_inference_steps=8,
        guidance_scale=scale,
        cfg_truncation=truncation,
        latents=z,
        output_type='latent',
    ).images
    network, cond = FAMILY.load(folder, height // 8), encoder.encode(PROMPTS)
    guidance = ClassifierFreeGuidance(1 + scale, null_of(encoder), low=1 - truncation)
    with torch.no_grad():
        ours = euler(lambda x, t: guidance(network, x, t, cond), z, FAMILY.times(8))
    assert (theirs - z).abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_prompts_through_the_cache(folder, encoder, tmp_path):
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    options = CacheOptions(dtype='fp32', batch_size=3, device='cpu')
    out = str(tmp_path / 'cache')
    cache_prompts(str(tmp_path / 'prompts.txt'), out, folder, options=options, max_length=LENGTH)
    cached, cond = CachedPrompts(out), encoder.encode(PROMPTS)
    items = cached.__getitems__(range(3))['cond']
    assert items.keys() == cond.keys()
    assert all(torch.equal(items[name], cond[name]) for name in cond)
    # and they are the pipeline's, without its padding
    tokens = encoder.pipeline.encode_prompt(
        list(PROMPTS), max_sequence_length=LENGTH, do_classifier_free_guidance=False
    )[0]
    lengths = [len(item) for item in tokens]
    assert len(set(lengths)) == 3 and cond['prompt_mask'].sum(1).tolist() == lengths
    assert all(
        torch.equal(row[: len(item)], item) for row, item in zip(cond['prompt_embeds'], tokens)
    )
    shard = load_file(f'{out}/shard_000000.safetensors')
    assert torch.equal(shard['prompt_embeds'], torch.cat(tokens))
    null, expected = CachedNullPrompt(out)(cond), null_of(encoder)(cond)
    assert all(torch.equal(null[name], expected[name]) for name in cond)


def test_latents_and_images_are_the_pipelines(folder, pipeline):
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    encoder = FAMILY.latent_encoder(folder)
    assert (encoder.factor, encoder.channels) == (8, 4)
    options = dict(height=48, width=64, num_inference_steps=1, guidance_scale=0.0, latents=latents)
    images = pipeline(list(PROMPTS[:2]), **options, output_type='pt').images
    x_0 = pipeline(list(PROMPTS[:2]), **options, output_type='latent').images
    decoded = LatentDecoder(folder)(x_0)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        mean = pipeline.vae.encode(decoded).latent_dist.mean
    # the inverse of what the pipeline decodes
    torch.testing.assert_close(encoder.encode(decoded) / 0.3611 + 0.1159, mean)


def build_fgm(null):
    torch.manual_seed(0)
    model = FGM(
        dict(type='ZImage', latent_size=6, config=CONFIG),
        teacher=dict(checkpoint=None),
        fm_time_sampler=dict(type='LogitNormal', mean=-1.0, std=2.0),
        fgm_time_sampler=dict(type='LogitNormal', mean=2.4, std=1.0),
        generator=dict(t_star=0.97, c_in=0.8),
        loss=dict(type='FGMLoss', l1_weight=0.0),
        gan=dict(
            time_sampler=dict(type='LogitNormal', mean=-1.0, std=1.0),
            feature_layer=(1, 2),
            head=dict(type='ConvDiscriminator', channels=8),
        ),
    )
    model.guidance = ClassifierFreeGuidance(5.0, null)
    for network in model.networks.values():
        vary(network)
    return model


def test_one_cycle(encoder):
    """Whom each phase trains, and the generator's gradient of Eq. 4.12 by stock calls alone."""
    model, cond = build_fgm(null_of(encoder)), encoder.encode(PROMPTS)
    real = dict(x_0=torch.randn(3, 4, 6, 6), cond=cond)
    z = torch.randn(3, 4, 6, 6)
    x_0 = model.generator(z, **cond)
    losses = model.loss('online', dict(x_0=x_0.detach(), cond=cond, real=real))
    sum(value for name, value in losses.items() if 'loss' in name).backward()

    def trained():
        networks = ('teacher', 'online', 'generator', 'discriminator')
        return [
            name
            for name in networks
            if any(p.grad is not None for p in getattr(model, name).parameters())
        ]

    assert trained() == ['online', 'discriminator']
    model.zero_grad(set_to_none=True)
    reference = copy.deepcopy(model)
    with SingleDeviceStrategy.frozen(SingleDeviceStrategy(), [model.online, model.discriminator]):
        torch.manual_seed(2)
        losses = model.loss('generator', dict(x_0=x_0, cond=cond))
        (losses['loss_fgm'] + 0 * losses['loss_g']).backward()
    assert trained() == ['generator']

    def tokens(cond):
        lengths = cond['prompt_mask'].sum(1).int().tolist()
        return [item[:n] for item, n in zip(cond['prompt_embeds'], lengths)]

    teacher, online, generator = (
        network.transformer
        for network in (reference.teacher, reference.online, reference.generator.network)
    )
    words, none = tokens(cond), tokens(null_of(encoder)(cond))
    x_0 = z - 0.97 * stock(generator, 0.8 * z, torch.full((3,), 0.97), words)  # (B.1)
    torch.manual_seed(2)
    t = reference.fgm_time_sampler(3)
    eps = torch.randn_like(x_0)
    s = t.view(-1, 1, 1, 1)
    x_t = (1 - s) * x_0 + s * eps
    u = 5 * stock(teacher, x_t, t, words) - 4 * stock(teacher, x_t, t, none)
    v = stock(online, x_t, t, words)
    (2 * (u - v) * (v - (eps - x_0))).mean().backward()  # (4.12)
    for p, q in zip(model.generator.network.parameters(), reference.generator.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_features_and_checkpointing(encoder):
    """Features are the image tokens after the layers; recomputing blocks changes no gradient."""
    torch.manual_seed(0)
    network, cond = vary(ZImage(6, config=CONFIG)), encoder.encode(PROMPTS)
    x_t, t = torch.randn(3, 4, 6, 4), torch.rand(3)
    outputs = []
    handles = [
        block.register_forward_hook(lambda m, a, out: outputs.append(out))
        for block in network.transformer.layers
    ]
    network(x_t, t, **cond)
    for handle in handles:
        handle.remove()
    features = network(x_t, t, **cond, feature_layer=(3, 1))
    for layer, found in zip((3, 1), features):
        assert found.shape == (3, 32, 3, 2)
        assert torch.equal(found.flatten(2).transpose(1, 2), outputs[layer - 1][:, :6])
    assert torch.equal(network(x_t, t, **cond, feature_layer=1), features[1])
    # all layers are there again
    assert len(network.transformer.layers) == 3
    grads = []
    for _ in range(2):
        for feature_layer in (None, 2):
            network.zero_grad()
            network(x_t, t, **cond, feature_layer=feature_layer).square().sum().backward()
            grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        network.transformer.enable_gradient_checkpointing()
        network.train()
    for before, after in zip(grads[:2], grads[2:]):
        assert len(before) == len(after) > 10
        torch.testing.assert_close(before, after)


def test_blocks_and_adapters():
    network = ZImage(6, config=CONFIG)
    classes = {type(module).__name__ for module in network.modules()}
    assert set(FAMILY.block_types) <= classes
    adapted = LoRA(2, 2, FAMILY.adapter_targets).adapted(network)
    blocks = {
        name.rsplit('.lora_A', 1)[0] for name, _ in adapted.named_parameters() if 'lora_A' in name
    }
    linear = {
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and ('attention.' in name or 'feed_for' in name)
    }
    assert blocks == linear and len(linear) == 7 * 5
    cfg = read_config(str(ROOT / 'configs/fgm/z_image_1024_lora.py'))
    assert tuple(cfg.model.lora.target_modules) == FAMILY.adapter_targets
    full = read_config(str(ROOT / 'configs/fgm/z_image_1024.py'))
    assert tuple(full.strategy.block_types) == FAMILY.block_types and not full.model.get('lora')
    for recipe in (cfg, full):
        assert recipe.model.decoder == FAMILY.decoder(recipe.pretrained)
        # the pipeline adds its scale to the guided difference, of which 1 is none
        assert recipe.model.guidance.scale == 4.0 + 1


def config_of(folder, **generator):
    """Text of the recipe's config on a tiny pipeline, with adapters or without."""
    return f"""
_base_ = [{str(ROOT / 'configs/fgm/z_image_1024_lora.py')!r}]
pretrained = {folder!r}
latent_size = 8
prompt_cache = 'nowhere'
model = dict(
    network=dict(dtype='float32'), gan=None, lora=None,
    generator=dict({', '.join(f'{key}={value}' for key, value in generator.items())}))
"""


@pytest.fixture(scope='module')
def problem(folder, tmp_path_factory):
    text = config_of(folder, t_star=0.9, c_out=0.9, c_in=0.8)
    return make_problem(tmp_path_factory.mktemp('z_image_fgm'), text)


@pytest.mark.slow
def test_export_is_the_stock_pipelines_step(problem, tmp_path):
    """With the call that the model card names, in a process without mmfgm."""
    cfg, out = read_config(problem.config), str(tmp_path / 'out')
    assert export_generator(cfg, problem.weights, out) == 'pipeline'
    ours = FGMInferencer(cfg, problem.weights, device='cpu')(PROMPTS, seeds=5, out='tensor')
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5 + i)) for i in range(3)]
    call = dict(num_inference_steps=1, guidance_scale=0.0, height=64, width=64)
    named = ', '.join(f'{key}={value!r}' for key, value in call.items())
    assert f"pipe(prompt='a red cat', {named})" in (tmp_path / 'out' / 'README.md').read_text()
    call.update(prompt=list(PROMPTS), latents=torch.stack(noise), output_type='pt')
    (theirs,) = images_without_mmfgm(tmp_path, out, [call])
    ours = (torch.stack(ours['predictions']) / 2 + 0.5).clamp(0, 1)
    assert theirs.shape == (3, 3, 64, 64) and theirs.std() > 0.01
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_adapters_alone(folder, pipeline, tmp_path):
    text = config_of(folder) + "\nmodel['lora'] = dict(rank=2, alpha=4)\n"
    problem = make_problem(tmp_path, text.replace('gan=None, lora=None', 'gan=None'))
    adapters = {name: p for name, p in problem.model.named_parameters() if 'lora_' in name}
    for name, p in adapters.items():
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    torch.save(dict(state_dict=adapters), problem.weights)
    cfg, out = read_config(problem.config), str(tmp_path / 'out')
    assert export_generator(cfg, problem.weights, out, lora=True) == 'lora'
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = dict(height=64, width=64, num_inference_steps=1, guidance_scale=0.0, latents=z)
    base = pipeline(PROMPTS[0], **options, output_type='pt').images
    pipeline.load_lora_weights(out)
    theirs = pipeline(PROMPTS[0], **options, output_type='pt').images
    pipeline.unload_lora_weights()
    ours = FGMInferencer(cfg, problem.weights, device='cpu')(PROMPTS[0], seeds=5, out='tensor')
    ours = (ours['predictions'][0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(theirs[0], ours, rtol=0, atol=1e-5)
    assert not torch.allclose(base[0], ours, atol=1e-3)


@pytest.mark.slow
def test_a_rehearsal(problem):
    cfg = read_config(problem.config)
    del cfg.optim_wrapper['discriminator']
    found = rehearse(cfg, gpus=1)
    numbers = sum(p.numel() for p in problem.model.teacher.parameters())
    assert found.parameters['teacher'] == numbers and found.peak.peak_bytes['activations'] > 0


def test_bad_input(folder, encoder, tmp_path):
    assert find(folder) is FAMILY
    with pytest.raises(UsageError, match='multiple of the patch size 2, and at most 32'):
        ZImage(34, config=CONFIG)
    with pytest.raises(UsageError, match='multiple of the patch size 2'):
        ZImage(7, config=CONFIG)
    with pytest.raises(UsageError, match='either pretrained .* or config'):
        ZImage(8)
    with pytest.raises(UsageError, match='layers 1 to 3'):
        ZImage(8, config=CONFIG).check_feature_layer(4)
    with pytest.raises(UsageError, match='which are max_length, dtype, found without_t5'):
        FAMILY.encoder(folder, without_t5=True)
    with pytest.raises(UsageError, match='expected max_length of 1 to 512, found 513'):
        ZImageTextEncoder(folder, max_length=513)
    long = 'a red cat ' * 10
    reason = encoder.bad(['a cat', '', long, 3])
    tokens = len(encoder.embed([long])[0])
    assert tokens == LENGTH and list(reason) == [1, 2, 3] and 'more than 96' in reason[2]
    (tmp_path / 'model_index.json').write_text(json.dumps(dict(_class_name='ZImageOmniPipeline')))
    with pytest.raises(UsageError, match='is a ZImageOmniPipeline, expected .* a ZImagePipeline'):
        find(str(tmp_path))
