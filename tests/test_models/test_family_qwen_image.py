# Copyright (c) mmfgm authors.
"""Qwen-Image's family against diffusers' own pipeline and transformer."""

import copy
import json

import pytest
import torch
from diffusers import QwenImagePipeline
from mmengine.registry import DefaultScope
from torch.nn.functional import pixel_unshuffle

from mmfgm.apis import FGMInferencer, OneStepPipeline, export_generator, read_config
from mmfgm.apis.rehearsal import rehearse
from mmfgm.caches import CacheOptions, cache_prompts
from mmfgm.datasets import CachedPrompts
from mmfgm.engine import SingleDeviceStrategy
from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance, euler
from mmfgm.models import FGM, CachedNullPrompt
from mmfgm.models.families import FAMILIES, QwenImage, QwenImageTextEncoder, find
from mmfgm.models.lora import LoRA
from mmfgm.registry import TASK_UTILS
from tests.conftest import ROOT
from tests.test_apis.conftest import make_problem
from tests.tiny_qwen import vary
from tests.tiny_qwen_image import CONFIG, make_tiny_qwen_image

PROMPTS = ['a red cat', 'the blue house on a green tree, photographed with a large lens', 'birds']
FAMILY = FAMILIES['qwen_image']
LENGTH = 256


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_tiny_qwen_image(tmp_path_factory.mktemp('qwen_image') / 'tiny')


@pytest.fixture(scope='module')
def pipeline(folder):
    pipeline = QwenImagePipeline.from_pretrained(folder)
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


def pack(pipeline, x):
    return pipeline._pack_latents(x, *x.shape)


@pytest.mark.parametrize('height, width, scale', [(64, 64, 4.0), (64, 96, 4.0), (48, 32, 1.0)])
def test_sampling_is_the_pipelines(folder, pipeline, encoder, height, width, scale):
    """8 Euler steps from the same noise, prompts of different lengths; norms by patch."""
    z = torch.randn(3, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        PROMPTS,
        negative_prompt=[''] * 3 if scale > 1 else None,
        true_cfg_scale=scale,
        height=height,
        width=width,
        num_inference_steps=8,
        latents=pack(pipeline, z),
        output_type='latent',
    ).images
    network, cond = FAMILY.load(folder, height // 8), encoder.encode(PROMPTS)
    times = FAMILY.times(8, tokens=theirs.shape[1])
    torch.testing.assert_close(times, pipeline.scheduler.sigmas, rtol=0, atol=1e-7)

    def sample(**options):
        guidance = ClassifierFreeGuidance(scale, null_of(encoder), **options)
        with torch.no_grad():
            return euler(lambda x, t: guidance(network, x, t, cond), z, times)

    ours = sample(rescale=True, patch=2)
    assert (ours - z).abs().max() > 1
    torch.testing.assert_close(pack(pipeline, ours), theirs, rtol=1e-5, atol=1e-5)
    # the norm of whole samples is another one
    if scale > 1:
        assert (sample(rescale=True) - ours).abs().max() > 1e-3


def test_prompts_through_the_cache(folder, encoder, tmp_path):
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    options = CacheOptions(dtype='fp32', batch_size=3, device='cpu')
    out = str(tmp_path / 'cache')
    cache_prompts(str(tmp_path / 'prompts.txt'), out, folder, options=options, max_length=LENGTH)
    cached, cond = CachedPrompts(out), encoder.encode(PROMPTS)
    items = cached.__getitems__(range(3))['cond']
    assert items.keys() == cond.keys()
    assert all(torch.equal(items[name], cond[name]) for name in cond)
    # and they are the pipeline's
    embeds, mask = encoder.pipeline.encode_prompt(PROMPTS)
    longest = mask.shape[1]
    assert torch.equal(cond['prompt_mask'][:, :longest], mask.float())
    assert torch.equal(cond['prompt_embeds'][:, :longest], embeds)
    assert not cond['prompt_mask'][:, longest:].any()
    assert encoder.count_tokens(PROMPTS) == mask.sum(1).tolist()
    null, expected = CachedNullPrompt(out)(cond), null_of(encoder)(cond)
    assert all(torch.equal(null[name], expected[name]) for name in cond)


def test_latents_and_images_are_the_pipelines(folder, pipeline):
    z = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    options = dict(height=48, width=64, num_inference_steps=2, true_cfg_scale=1.0)
    options['latents'] = pack(pipeline, z)
    images = pipeline(PROMPTS[:2], **options, output_type='pt').images
    packed = pipeline(PROMPTS[:2], **options, output_type='latent').images
    x_0 = pipeline._unpack_latents(packed, 48, 64, 8)[:, :, 0]
    decoded = TASK_UTILS.build(FAMILY.decoder(folder))(x_0)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-5, atol=1e-5)
    encoder = FAMILY.latent_encoder(folder)
    assert (encoder.factor, encoder.channels) == (8, 4)
    with torch.no_grad():
        mean = pipeline.vae.encode(decoded.unsqueeze(2)).latent_dist.mean[:, :, 0]
    # the inverse of what the pipeline decodes
    config = pipeline.vae.config
    shift, scale = (
        torch.tensor(values).view(1, 4, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    torch.testing.assert_close(encoder.encode(decoded) * scale + shift, mean)


def build_fgm(null):
    torch.manual_seed(0)
    model = FGM(
        dict(type='QwenImage', latent_size=6, config=CONFIG),
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
    model.guidance = ClassifierFreeGuidance(4.0, null, rescale=True, patch=2)
    for network in model.networks.values():
        vary(network)
    return model


def test_one_cycle(encoder):
    """Whom each phase trains, and the generator's gradient of Eq. 4.12 by stock calls alone, on
    packed latents."""
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

    def stock(network, x_t, t, cond):
        return network.transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=cond['prompt_embeds'],
            encoder_hidden_states_mask=cond['prompt_mask'],
            img_shapes=[[(1, 3, 3)]] * 3,
            return_dict=False,
        )[0]

    def packed(x):
        return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)

    z = packed(z)
    x_0 = z - 0.97 * stock(reference.generator.network, 0.8 * z, torch.full((3,), 0.97), cond)
    torch.manual_seed(2)
    t = reference.fgm_time_sampler(3)
    eps = packed(torch.randn(3, 4, 6, 6))
    s = t.view(-1, 1, 1)
    x_t = (1 - s) * x_0 + s * eps
    u_cond = stock(reference.teacher, x_t, t, cond)
    u = 4 * u_cond - 3 * stock(reference.teacher, x_t, t, null_of(encoder)(cond))
    u = u * u_cond.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)
    v = stock(reference.online, x_t, t, cond)
    (2 * (u - v) * (v - (eps - x_0))).mean().backward()  # (4.12)
    for p, q in zip(model.generator.network.parameters(), reference.generator.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_features_and_checkpointing(encoder):
    """Features are the image tokens after the layers; recomputing blocks changes no gradient."""
    torch.manual_seed(0)
    network, cond = vary(QwenImage(6, config=CONFIG)), encoder.encode(PROMPTS)
    x_t, t = torch.randn(3, 4, 6, 4), torch.rand(3)
    outputs = []
    handles = [
        block.register_forward_hook(lambda m, a, out: outputs.append(out[1]))
        for block in network.transformer.transformer_blocks
    ]
    network(x_t, t, **cond)
    for handle in handles:
        handle.remove()
    features = network(x_t, t, **cond, feature_layer=(3, 1))
    for layer, found in zip((3, 1), features):
        assert found.shape == (3, 32, 3, 2)
        assert torch.equal(found.flatten(2).transpose(1, 2), outputs[layer - 1])
    assert torch.equal(network(x_t, t, **cond, feature_layer=1), features[1])
    # all layers are there again
    assert len(network.transformer.transformer_blocks) == 3
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
    network = QwenImage(6, config=CONFIG)
    classes = {type(module).__name__ for module in network.modules()}
    assert set(FAMILY.block_types) <= classes
    adapted = LoRA(2, 2, FAMILY.adapter_targets).adapted(network)
    layers = {
        name.rsplit('.lora_A', 1)[0] for name, _ in adapted.named_parameters() if 'lora_A' in name
    }
    linear = {
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and ('.attn.' in name or '_mlp.' in name)
    }
    assert layers == linear and len(linear) == 12 * 3
    cfg = read_config(str(ROOT / 'configs/fgm/qwen_image_1024_lora.py'))
    assert tuple(cfg.model.lora.target_modules) == FAMILY.adapter_targets
    guidance = TASK_UTILS.build({**cfg.model.guidance, 'null': dict(type='NullLabel', label=0)})
    assert guidance.rescale and guidance.patch == 2


@pytest.fixture(scope='module')
def problem(folder, tmp_path_factory):
    text = f"""
_base_ = [{str(ROOT / 'configs/fgm/qwen_image_1024_lora.py')!r}]
pretrained = {folder!r}
latent_size = 8
prompt_cache = 'nowhere'
model = dict(
    network=dict(dtype='float32'), gan=None, lora=None,
    generator=dict(t_star=0.9, c_out=0.9, c_in=0.8))
"""
    return make_problem(tmp_path_factory.mktemp('qwen_image_fgm'), text)


@pytest.mark.slow
def test_export_is_the_generator_as_the_pipeline_has_no_single_step(problem, pipeline, tmp_path):
    z = pack(pipeline, torch.randn(1, 4, 8, 8))
    options = dict(height=64, width=64, num_inference_steps=1, latents=z, output_type='latent')
    with pytest.warns(RuntimeWarning, match='invalid value'):
        assert pipeline(PROMPTS[0], **options).images.isnan().all()
    cfg, out = read_config(problem.config), str(tmp_path / 'out')
    assert export_generator(cfg, problem.weights, out) == 'generator'
    ours = FGMInferencer(cfg, problem.weights, device='cpu')(PROMPTS, seeds=5, out='tensor')
    theirs = OneStepPipeline.from_pretrained(out, device='cpu')(
        prompt=PROMPTS, seeds=[5, 6, 7], output_type='tensor'
    ).images
    assert torch.stack(theirs).std() > 0.01
    torch.testing.assert_close(theirs, ours['predictions'], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_rehearsal(problem):
    cfg = read_config(problem.config)
    del cfg.optim_wrapper['discriminator']
    found = rehearse(cfg, gpus=1)
    numbers = sum(p.numel() for p in problem.model.teacher.parameters())
    assert found.parameters['teacher'] == numbers and found.peak.peak_bytes['activations'] > 0


def test_bad_input(folder, encoder, tmp_path):
    assert find(folder) is FAMILY
    with pytest.raises(UsageError, match='multiple of the patch size 2'):
        QwenImage(7, config=CONFIG)
    with pytest.raises(UsageError, match='either pretrained .* or config'):
        QwenImage(8)
    with pytest.raises(UsageError, match='found one with use_additional_t_cond=True'):
        QwenImage(8, config=dict(CONFIG, use_additional_t_cond=True))
    with pytest.raises(UsageError, match='layers 1 to 3'):
        QwenImage(8, config=CONFIG).check_feature_layer(4)
    with pytest.raises(UsageError, match='which are max_length, dtype, found without_t5'):
        FAMILY.encoder(folder, without_t5=True)
    with pytest.raises(UsageError, match='expected max_length of 1 to 1024, found 0'):
        QwenImageTextEncoder(folder, max_length=0)
    with pytest.raises(UsageError, match='at least 2 steps, found 1'):
        FAMILY.times(1)
    reason = encoder.bad(['a cat', '', 'a red cat ' * 20, 3])
    assert list(reason) == [1, 2, 3] and 'more than 256' in reason[2]
    (tmp_path / 'model_index.json').write_text(
        json.dumps(dict(_class_name='QwenImageEditPipeline'))
    )
    with pytest.raises(UsageError, match='is a QwenImageEditPipeline, expected'):
        find(str(tmp_path))
