# Copyright (c) mmfgm authors.
"""FLUX.2 against diffusers' own pipelines, on tiny random models of dev's and klein's kinds."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

from mmfgm.apis import export_generator, read_config
from mmfgm.caches import CacheOptions, cache_latents, cache_prompts
from mmfgm.datasets import CachedLatents, CachedPrompts
from mmfgm.errors import UsageError
from mmfgm.flow import euler
from mmfgm.models import FGM, FlowMatching, OneStepGenerator, Sampling
from mmfgm.models.families import FAMILIES, Flux2, Flux2Decoder, PipelineStep, family_of, find
from tests.conftest import ROOT
from tests.test_apis.conftest import make_problem
from tests.test_models.test_family_flux import noise, ours, trained_by, with_guidance
from tests.tiny_flux2 import CONFIG, make_tiny_flux2
from tests.without_mmfgm import images_without_mmfgm

PROMPTS = ['a red cat', 'the blue house on a green tree']
FAMILY = FAMILIES['flux2']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flux2')
    return dict(
        dev=make_tiny_flux2(folder / 'dev'),
        base=make_tiny_flux2(folder / 'base', dev=False),
        distilled=make_tiny_flux2(folder / 'distilled', dev=False, distilled=True),
    )


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        yield


def open_pipeline(folder):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(folder, z, output_type='latent', steps=8, **options):
    """What diffusers' pipeline makes of noise ``(N, C, h, w)``: latents of the VAE, or images."""
    height, width = (4 * side for side in z.shape[-2:])
    return open_pipeline(folder)(
        prompt=PROMPTS,
        latents=z,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type=output_type,
        max_sequence_length=300,
        **options,
    ).images


@pytest.mark.parametrize(
    'kind, size, guidance',
    [('dev', 4, 4.0), ('dev', (2, 5), 2.5), ('distilled', 4, None)],
)
def test_sampling_is_the_pipelines(folders, kind, size, guidance):
    """8 Euler steps from the same noise, square or not."""
    folder = folders[kind]
    network = FAMILY.load(folder, latent_size=size, guidance=guidance).eval()
    z = noise(*network.event_shape)
    cond = FAMILY.encode(folder, PROMPTS, max_length=300)
    times = FAMILY.times(8, latent_size=size, pretrained=folder)
    with torch.no_grad():
        made = euler(lambda x, t: network(x, t, **cond), z, times)
    theirs = stock(folder, z, guidance_scale=guidance or 4.0)
    assert z.shape[2:] == ((size, size) if isinstance(size, int) else size)
    # dev's pipeline hands out the network's tokens, klein's the latents of the VAE
    made = made.flatten(2).transpose(1, 2) if kind == 'dev' else Flux2Decoder(folder).unpack(made)
    torch.testing.assert_close(made, theirs, rtol=1e-5, atol=1e-5)


def test_classifier_free_guidance_is_the_pipelines(folders, monkeypatch):
    """Of klein's base models, by two calls."""
    folder = folders['base']
    encoder = FAMILY.encoder(folder, max_length=300)
    null = {name: value[0] for name, value in FAMILY.null(encoder).items()}
    monkeypatch.setattr(
        'mmfgm.models.families.latents.CachedPrompts', lambda path: SimpleNamespace(null=null)
    )
    model = FlowMatching(
        dict(type='Flux2', latent_size=(4, 3), pretrained=folder),
        time_sampler=dict(type='Uniform'),
        null_condition=dict(type='CachedNullPrompt', path='cache'),
    )
    batch = dict(idx=torch.arange(2), seed=[3, 4], cond=encoder.encode(PROMPTS))
    made = model.sample(batch, Sampling('network', 8, guidance=4.0, spacing='pipeline'))
    theirs = stock(folder, noise(16, 4, 3), guidance_scale=4.0)
    torch.testing.assert_close(Flux2Decoder(folder).unpack(made), theirs, rtol=1e-5, atol=1e-5)


def test_prompts_through_the_cache(folders, tmp_path):
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    for kind in ('dev', 'base'):
        out = str(tmp_path / kind)
        options = CacheOptions(dtype='fp32', batch_size=1, device='cpu')
        source = str(tmp_path / 'prompts.txt')
        cache_prompts(source, out, folders[kind], options=options, max_length=300)
        items = CachedPrompts(out).__getitems__(range(2))
        cond = FAMILY.encode(folders[kind], PROMPTS, max_length=300)
        assert cond['prompt_embeds'].shape == (2, 300, 24)
        assert not torch.equal(*cond['prompt_embeds'])
        torch.testing.assert_close(items['cond'], cond)


def test_latents_and_images_as_in_the_pipeline(folders, tmp_path):
    folder = folders['distilled']
    z = noise(16, 3, 4)
    images = stock(folder, z, 'pt', steps=1)
    network = FAMILY.load(folder, latent_size=(3, 4))
    with torch.no_grad():
        cond = FAMILY.encode(folder, PROMPTS, max_length=300)
        decoded = Flux2Decoder(folder, batch_size=1)(z - network(z, torch.ones(2), **cond))
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-4, atol=1e-5)
    # and back, through a cache of images
    (tmp_path / 'images').mkdir()
    image = Image.fromarray((255 * torch.rand(16, 16, 3)).byte().numpy())
    image.save(tmp_path / 'images' / 'a.png')
    source, out = str(tmp_path / 'images'), str(tmp_path / 'latents')
    cache_latents(source, out, folder, 16, options=CacheOptions(dtype='fp32', device='cpu'))
    pipeline = open_pipeline(folder)
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(image)
        expected = pipeline._encode_vae_image(pixels, generator=None)[0]
    cached = CachedLatents(out, (16, 4, 4), prompts=False)
    torch.testing.assert_close(cached[0]['x_0'], expected)


def conditions(n):
    return dict(prompt_embeds=torch.randn(n, 5, 24, dtype=torch.float64))


def build_fgm(**network):
    """FGM with a GAN on random networks in float64."""
    return FGM(
        dict(type='Flux2', latent_size=(2, 4), config=CONFIG, dtype='float64', **network),
        teacher=dict(checkpoint=None),
        generator=dict(t_star=0.97, c_in=0.8),
        loss=dict(type='FGMLoss', l1_weight=0.0),
        fm_time_sampler=dict(type='LogitNormal', mean=-1.0, std=2.0),
        fgm_time_sampler=dict(type='LogitNormal', mean=2.4, std=1.0),
        gan=dict(
            feature_layer=[1, 3],
            time_sampler=dict(type='Uniform'),
            head=dict(type='ConvDiscriminator', channels=8, num_layers=1),
        ),
    ).double()


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_cycle_leaves_gradients_where_they_belong(checkpointing):
    model = build_fgm(checkpointing=checkpointing).train()
    cond, z = conditions(2), torch.randn(2, 16, 2, 4, dtype=torch.float64)
    real = dict(x_0=torch.randn_like(z), cond=conditions(2))
    x_0 = model.generator(z, **cond)
    samples = dict(cond=cond, x_0=x_0.detach(), real=real)
    assert trained_by(model, 'online', samples) == {'online', 'discriminator'}
    assert trained_by(model, 'generator', dict(samples, x_0=x_0)) == {'generator'}
    assert all(p.grad is not None for p in model.generator.parameters())


def test_features_are_those_of_the_layer():
    """Single blocks hand on text and image tokens in one sequence, double ones apart."""
    network, cond = build_fgm().teacher, conditions(2)
    x_t, t = torch.randn(2, 16, 2, 4, dtype=torch.float64), torch.rand(2)
    transformer, seen = network.transformer, []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        block.register_forward_hook(lambda m, a, out: seen.append(out))
    network(x_t, t, **cond)
    whole = list(seen)
    for layer in (1, 2, 3, 4):
        seen.clear()
        features = network(x_t, t, **cond, feature_layer=layer).flatten(2).transpose(1, 2)
        expected = whole[layer - 1][1] if layer <= 2 else whole[layer - 1][:, 5:]
        torch.testing.assert_close(features, expected)
        assert len(seen) == layer


def test_names_of_blocks_and_layers():
    network = build_fgm().teacher
    classes = {type(module).__name__ for module in network.modules()}
    assert classes.issuperset(FAMILY.block_types)
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and '_blocks.' in name
    ]
    left = {name for name in linear if not name.endswith(FAMILY.adapter_targets)}
    assert left == {f'transformer.single_transformer_blocks.{i}.attn.to_out' for i in (0, 1)}
    for ending in FAMILY.adapter_targets:
        assert any(name.endswith(f'.{ending}') for name in linear)


def recipe(folder, **generator):
    """Text of the config of the recipe on a tiny pipeline, for sampling alone."""
    return f"""
_base_ = [{str(ROOT / 'configs/fgm/flux2_klein_1024_lora.py')!r}]
pretrained = {folder!r}
latent_size = 4
prompt_cache = 'nowhere'
model = dict(
    gan=None,
    guidance=None,
    network=dict(dtype='float32'),
    generator=dict({', '.join(f'{k}={v}' for k, v in generator.items())}))
"""


@pytest.mark.slow
@pytest.mark.parametrize('lora', [False, True])
def test_export_is_exact(folders, tmp_path, lora):
    """With the guidance that the card names, its pipeline's own."""
    generator = (
        dict(t_star=1.0, c_out=1.0, c_in=1.0) if lora else dict(t_star=0.9, c_out=0.95, c_in=0.8)
    )
    problem = make_problem(tmp_path, recipe(folders['dev'], **generator))
    adapters = {name: p for name, p in problem.model.named_parameters() if 'lora_' in name}
    for p in adapters.values():
        p.data = 0.1 * torch.randn_like(p)
    torch.save(dict(state_dict=adapters), problem.weights)
    out = tmp_path / 'out'
    export_generator(read_config(problem.config), problem.weights, str(out), lora=lora)
    base, adapter = (folders['dev'], str(out)) if lora else (str(out), None)
    calls = with_guidance(noise(16, 4, 4), 4.0, 9.0)
    right, wrong = images_without_mmfgm(tmp_path, base, calls, adapter)
    images = ours(problem.config, problem.weights)
    torch.testing.assert_close(right, images, rtol=0, atol=1e-5)
    assert (wrong - images).abs().max() > 1e-4 and images.std() > 0.1
    call = (
        "pipe(prompt='a red cat', num_inference_steps=1, guidance_scale=4.0, height=64, width=64)"
    )
    assert call in (out / 'README.md').read_text()
    if not lora:
        torch.testing.assert_close(ours(str(out)), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_folding(folders, dtype, tolerance):
    """Without biases; in the pipeline's dtype with the rounding of its time."""
    for kind in ('dev', 'base'):
        network = FAMILY.load(folders[kind], latent_size=4)
        generator = OneStepGenerator(network, t_star=0.7, c_out=0.5, c_in=0.9)
        z, cond = noise(16, 4, 4), dict(prompt_embeds=torch.randn(2, 5, 24))
        with torch.no_grad():
            x_0 = generator(z, **cond)
            step = FAMILY.step(folders[kind])
            assert step == PipelineStep(1000.0, 1.0, 1.0)
            network.transformer = FAMILY.fold(generator, step, dtype)
            folded = z - network(z, torch.ones(2), **cond)
        assert network.transformer.dtype == dtype
        torch.testing.assert_close(folded, x_0, rtol=0, atol=tolerance)


def test_the_family_is_found(folders, tmp_path):
    assert find(folders['dev']) is find(folders['base']) is FAMILY
    assert family_of('Flux2') is FAMILY and family_of('Flux') is FAMILIES['flux']
    (tmp_path / 'model_index.json').write_text('{"_class_name": "Flux2KleinInpaintPipeline"}')
    with pytest.raises(UsageError, match='is a Flux2KleinInpaintPipeline, expected'):
        find(str(tmp_path))


def test_the_config_says_what_the_family_does():
    cfg = read_config(str(ROOT / 'configs/fgm/flux2_klein_1024_lora.py'))
    assert tuple(cfg.model.lora.target_modules) == FAMILY.adapter_targets
    full = read_config(str(ROOT / 'configs/fgm/flux2_klein_1024.py'))
    assert tuple(full.strategy.block_types) == FAMILY.block_types and not full.model.get('lora')
    for recipe in (cfg, full):
        assert recipe.model.decoder == FAMILY.decoder(recipe.pretrained)
        samplings = recipe.default_hooks.samples.samplings
        assert list(samplings) == ['teacher, 50 NFE', 'generator, 1 NFE']
        assert samplings['teacher, 50 NFE'].spacing == 'pipeline'


def test_the_config_of_dev_shards_the_blocks_and_guides_once():
    cfg = read_config(str(ROOT / 'configs/fgm/flux2_dev_1024_lora.py'))
    assert tuple(cfg.strategy.block_types) == FAMILY.block_types
    assert cfg.model.network.guidance == FAMILY.network.default_guidance
    # an input of the network, so nothing guides beside it
    assert cfg.model.guidance is None
    sampling = cfg.default_hooks.samples.samplings['teacher, 50 NFE']
    assert sampling.get('guidance') is None and sampling.spacing == 'pipeline'


def test_bad_input(folders):
    with pytest.raises(UsageError, match='no guidance for a network .* found guidance=4.0'):
        Flux2(4, pretrained=folders['base'], guidance=4.0)
    with pytest.raises(UsageError, match='Flux2 takes either pretrained .* or config'):
        Flux2(4)
    with pytest.raises(UsageError, match='which are max_length, dtype, found without_t5'):
        FAMILY.encoder(folders['dev'], without_t5=True)
    for kind in ('dev', 'base'):
        encoder = FAMILY.encoder(folders[kind])
        (tokens,) = encoder.count_tokens(['a red cat'])
        # the conversation around the prompt counts
        encoder.max_length = tokens + 10
        assert tokens > 9 and encoder.bad(['a red cat', '', 3, PROMPTS[1]]) == {
            1: 'is empty',
            2: 'is not text but 3',
            3: f'has {tokens + 21} text tokens, more than {tokens + 10}',
        }
