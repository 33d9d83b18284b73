# Copyright (c) mmfgm authors.
"""SD3 against diffusers' own pipeline, and FGM with its GAN against formulae written out by
hand."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope

from mmfgm.engine import SingleDeviceStrategy
from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance
from mmfgm.models import FGM, SD3, CachedNullPrompt, FlowMatching, LatentDecoder, Sampling
from mmfgm.models.families.flux import FluxTextEncoder
from tests.tiny_sd3 import SD35, make_tiny_sd3

CONFIG = dict(
    sample_size=8,
    patch_size=2,
    in_channels=16,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=64,
    pos_embed_max_size=8,
)


@pytest.fixture(scope='module', params=[{}, SD35], ids=['sd3', 'sd3.5'])
def folder(request, tmp_path_factory):
    return make_tiny_sd3(tmp_path_factory.mktemp('sd3') / 'tiny', **request.param)


@pytest.fixture(scope='module')
def pipeline(folder):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        yield


def random_sd3(dtype='float64', **config):
    """Without the zero initialisation of the modulation, which would make most of the network the
    identity."""
    network = SD3(8, config={**CONFIG, **config}, dtype=dtype)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network


def conditions(n, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(
        prompt_embeds=torch.randn(n, 5, 32, generator=g, dtype=dtype),
        pooled_embeds=torch.randn(n, 64, generator=g, dtype=dtype),
    )


def null_of(cond):
    return {name: torch.zeros_like(value) for name, value in cond.items()}


def cached_null(monkeypatch, **embeds):
    monkeypatch.setattr(
        'mmfgm.models.families.latents.CachedPrompts', lambda path: SimpleNamespace(null=embeds)
    )


def test_sampling_is_the_pipelines(folder, pipeline, monkeypatch):
    """28 Euler steps with guidance from the same noise: latents, and the images they decode to."""
    prompts = ['a red cat', 'the blue house on a green tree']
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompts, prompts, prompts
        )
        assert not torch.equal(embeds, negative)
    cached_null(monkeypatch, prompt_embeds=negative[0], pooled_embeds=negative_pooled[0])
    model = FlowMatching(
        dict(type='SD3', latent_size=8, pretrained=folder),
        time_sampler=dict(type='Uniform'),
        null_condition=dict(type='CachedNullPrompt', path='cache'),
    )
    batch = dict(
        idx=torch.arange(2),
        seed=torch.tensor([5, 6]),
        cond=dict(prompt_embeds=embeds, pooled_embeds=pooled),
    )
    sampling = Sampling('network', 28, shift=3.0, guidance=4.0)
    settings = dict(num_inference_steps=28, guidance_scale=4.0, latents=model.sampler.noise([5, 6]))
    theirs = pipeline(prompts, **settings, output_type='latent')
    ours = model.sample(batch, sampling)
    torch.testing.assert_close(ours, theirs.images, rtol=1e-5, atol=1e-5)
    images = pipeline(prompts, **settings, output_type='pt').images
    decoded = LatentDecoder(folder, batch_size=1)(ours)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-4, atol=1e-4)
    # the even grid is another one, so the shift matters
    assert (model.sample(batch, Sampling('network', 28, guidance=4.0)) - ours).abs().max() > 1e-3


def test_guidance_in_one_call_is_two_calls():
    network, cond = random_sd3(), conditions(3)
    x_t, t = torch.randn(3, 16, 8, 8, dtype=torch.float64), torch.rand(3)
    u, u_null = network(x_t, t, **cond), network(x_t, t, **null_of(cond))
    torch.testing.assert_close(
        ClassifierFreeGuidance(4.0, null_of)(network, x_t, t, cond), u_null + 4 * (u - u_null)
    )


def test_null_prompt_fits_the_batch(monkeypatch):
    cached_null(monkeypatch, prompt_embeds=torch.ones(3, 32), pooled_embeds=torch.ones(64))
    null = CachedNullPrompt('cache')(conditions(2))
    assert (
        null['prompt_embeds'].shape == (2, 5, 32) and null['prompt_embeds'].dtype == torch.float64
    )
    assert (
        null['prompt_embeds'][0].sum(1).tolist() == [32, 32, 32, 0, 0]
        and null['pooled_embeds'].sum() == 128
    )


@pytest.mark.parametrize('layer', [1, 2, 4])
@pytest.mark.parametrize('config', [{}, SD35], ids=['sd3', 'sd3.5'])
def test_features_are_those_of_the_layer(config, layer):
    network, cond = random_sd3(**config), conditions(2)
    x_t, t = torch.randn(2, 16, 8, 8, dtype=torch.float64), torch.rand(2)
    outputs = []
    handles = [
        block.register_forward_hook(lambda m, a, out: outputs.append(out[1]))
        for block in network.transformer.transformer_blocks
    ]
    network(x_t, t, **cond)
    for handle in handles:
        handle.remove()
    features = network(x_t, t, **cond, feature_layer=layer)
    assert features.shape == (2, 32, 4, 4)
    torch.testing.assert_close(
        features.flatten(2).transpose(1, 2), outputs[layer - 1], rtol=0, atol=0
    )


def build_fgm(**kwargs):
    torch.manual_seed(0)
    network = dict(type='SD3', latent_size=8, config=CONFIG)
    model = FGM(
        network,
        teacher=dict(checkpoint=None),
        fm_time_sampler=dict(type='LogitNormal', mean=-1.0, std=2.0),
        fgm_time_sampler=dict(type='LogitNormal', mean=2.4, std=1.0),
        generator=dict(t_star=0.97, c_in=0.8),
        loss=dict(type='FGMLoss', l1_weight=0.0),
        loss_scale=100.0,
        gan=dict(
            time_sampler=dict(type='LogitNormal', mean=-1.0, std=1.0),
            head=dict(type='ConvDiscriminator', channels=8),
            **kwargs,
        ),
    ).double()
    model.guidance = ClassifierFreeGuidance(4.0, null_of)
    for name in ('teacher', 'online', 'generator', 'discriminator'):
        for p in getattr(model, name).parameters():
            torch.nn.init.normal_(p, std=0.2)
    return model


def noised(x_0, sampler):
    t = sampler(len(x_0))
    eps = torch.randn_like(x_0)
    s = t.double().view(-1, 1, 1, 1)
    return (1 - s) * x_0 + s * eps, eps - x_0, t


def test_the_cycle_is_what_the_paper_writes():
    """Both phases' gradients against Algorithm 1, B.2 and Eq. 4.12 written out."""
    model = build_fgm()
    reference = copy.deepcopy(model)
    cond, z = conditions(3), torch.randn(3, 16, 8, 8, dtype=torch.float64)
    real_x_0 = torch.randn(3, 16, 8, 8, dtype=torch.float64)
    real_cond = conditions(3, seed=1)
    samples = dict(cond=cond, real=dict(x_0=real_x_0, cond=real_cond))

    def generate(m):
        return z - 0.97 * m.generator.network(0.8 * z, torch.full((3,), 0.97), **cond)  # (B.2)

    # online phase, and the head beside it
    torch.manual_seed(1)
    losses = model.loss('online', dict(**samples, x_0=model.generator(z, **cond).detach()))
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    torch.manual_seed(1)
    x_0 = generate(reference).detach()
    x_t, target, t = noised(x_0, reference.fm_time_sampler)
    loss = (reference.online(x_t, t, **cond) - target).square().mean()
    both = {name: torch.cat([real_cond[name], cond[name]]) for name in cond}
    x_t, _, t = noised(torch.cat([real_x_0, x_0]), reference.gan.sampler)
    logits = reference.discriminator(reference.online(x_t, t, **both, feature_layer=2)).flatten(1)
    loss = loss + 5e-2 * (-F.logsigmoid(logits[:3]).mean() - F.logsigmoid(-logits[3:]).mean())
    loss.backward()
    for name in ('online', 'discriminator'):
        for a, b in zip(getattr(model, name).parameters(), getattr(reference, name).parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in model.teacher.parameters()) and all(
        p.grad is None for p in model.generator.parameters()
    )

    # generator phase
    model.zero_grad(set_to_none=True)
    with SingleDeviceStrategy.frozen(SingleDeviceStrategy(), [model.online, model.discriminator]):
        torch.manual_seed(2)
        losses = model.loss('generator', dict(**samples, x_0=model.generator(z, **cond)))
        sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert all(
        p.grad is None
        for name in ('teacher', 'online', 'discriminator')
        for p in getattr(model, name).parameters()
    )
    torch.manual_seed(2)
    x_0 = generate(reference)
    x_t, target, t = noised(x_0, reference.fgm_time_sampler)
    null = null_of(cond)
    u = 4 * reference.teacher(x_t, t, **cond) - 3 * reference.teacher(x_t, t, **null)
    v = reference.online(x_t, t, **cond)
    fgm = (2 * (u - v) * (v - target)).mean()  # (4.12)
    on_x_0 = [torch.autograd.grad(100 * fgm, x_0, retain_graph=True)[0].norm()]
    x_t, _, t = noised(x_0, reference.gan.sampler)
    logits = reference.discriminator(reference.online(x_t, t, **cond, feature_layer=2))
    gan = 1e-2 * -F.logsigmoid(logits).mean()
    on_x_0.append(torch.autograd.grad(100 * gan, x_0, retain_graph=True)[0].norm())
    # what the log says about the size of each term
    measured = [losses['grad_x_0_fgm'], losses['grad_x_0_gan']]
    torch.testing.assert_close(measured, on_x_0, rtol=1e-6, atol=0)
    loss = 100 * (fgm + gan)
    gradients = torch.autograd.grad(loss, list(reference.generator.parameters()))
    for p, expected in zip(model.generator.parameters(), gradients):
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-9)


def test_the_online_network_can_be_left_to_flow_matching():
    real = dict(x_0=torch.randn(2, 16, 8, 8).double(), cond=conditions(2))
    samples = dict(cond=conditions(2), real=real)
    samples['x_0'] = torch.randn(2, 16, 8, 8).double()
    model = build_fgm(train_features=False)
    model.loss('online', samples)['loss_d'].backward()
    assert all(p.grad is None for p in model.online.parameters())
    assert all(p.grad is not None for p in model.discriminator.parameters())


def test_features_of_several_layers():
    """One call gives what one call each gives; each layer has a head of its own."""
    network, cond = random_sd3(), conditions(2)
    x_t, t = torch.randn(2, 16, 8, 8, dtype=torch.float64), torch.rand(2)
    several = network(x_t, t, **cond, feature_layer=(3, 1))
    for layer, features in zip((3, 1), several):
        torch.testing.assert_close(features, network(x_t, t, **cond, feature_layer=layer))
    head = build_fgm(feature_layer=[3, 1]).discriminator
    logits = [one(features).flatten(1) for one, features in zip(head.heads, several)]
    torch.testing.assert_close(head(several), torch.cat(logits, 1))
    assert not torch.equal(logits[0], logits[1])


def test_the_teacher_can_give_the_features():
    """It is not trained, and the generator's gradient passes through it."""
    model = build_fgm(features='teacher')
    samples = dict(cond=conditions(2), real=dict(x_0=torch.randn(2, 16, 8, 8).double()))
    samples['real']['cond'] = conditions(2)
    samples['x_0'] = torch.randn(2, 16, 8, 8).double().requires_grad_(True)
    losses = model.loss('online', samples)
    assert all(p.grad is None for p in model.teacher.parameters())
    (grad,) = torch.autograd.grad(losses['loss_d'], next(model.discriminator.parameters()))
    assert grad.abs().sum() > 0
    torch.nn.init.zeros_(next(model.online.parameters()))  # plays no part
    model.loss('generator', samples)['loss_g'].backward()
    assert samples['x_0'].grad.abs().sum() > 0


def test_the_adversarial_term_begins_at_its_iteration():
    model = build_fgm(start=3)
    samples = dict(cond=conditions(2), real=dict(x_0=torch.randn(2, 16, 8, 8).double()))
    samples['real']['cond'] = conditions(2)
    samples['x_0'] = torch.randn(2, 16, 8, 8).double().requires_grad_(True)
    for iteration, begun in ((0, False), (2, False), (3, True)):
        model.iteration = iteration
        assert ('loss_g' in model.loss('generator', samples)) is begun
        assert 'loss_d' in model.loss('online', samples)


def test_checkpointing_changes_nothing():
    network, cond = random_sd3(), conditions(2)
    x_t, t = torch.randn(2, 16, 8, 8, dtype=torch.float64), torch.rand(2)
    grads = []
    for _ in range(2):
        for feature_layer in (None, 2):
            network.zero_grad()
            network(x_t, t, **cond, feature_layer=feature_layer).square().sum().backward()
            grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        network.transformer.enable_gradient_checkpointing()
    for before, after in zip(grads[:2], grads[2:]):
        assert len(before) == len(after) > 10
        for a, b in zip(before, after):
            torch.testing.assert_close(a, b)


def test_bad_input(folder, tmp_path):
    with pytest.raises(UsageError, match='a Stable Diffusion 3 pipeline.*take SD3TextEncoder'):
        FluxTextEncoder(folder)
    with pytest.raises(UsageError, match='(?s)cannot be loaded.*accepted'):
        SD3(8, pretrained=str(tmp_path))
    with pytest.raises(UsageError, match='multiple of the patch size 2, and at most 16'):
        SD3(18, pretrained=folder)
    with pytest.raises(UsageError, match='either pretrained .* or config'):
        SD3(8)
    with pytest.raises(UsageError, match='layers 1 to 4'):
        build_fgm(feature_layer=5)
    with pytest.raises(UsageError, match='layers 1 to 4'):
        build_fgm(feature_layer=(2, 5))
    with pytest.raises(UsageError, match="use 'online' or 'teacher'"):
        build_fgm(features='generator')
    with pytest.raises(UsageError, match='would train the teacher'):
        build_fgm(features='teacher', train_features=True)
    with pytest.raises(UsageError, match='guidance=4.0 of network needs'):
        model = FlowMatching(dict(type='SD3', latent_size=8, config=CONFIG), dict(type='Uniform'))
        model.check(Sampling('network', guidance=4.0))
    other = tmp_path / 'other' / 'transformer'
    other.mkdir(parents=True)
    (other / 'config.json').write_text(json.dumps(dict(_class_name='FluxTransformer2DModel')))
    with pytest.raises(UsageError, match='holds a FluxTransformer2DModel'):
        SD3(8, pretrained=str(Path(other).parent))
