# Copyright (c) mmfgm authors.
"""FLUX.1 against diffusers' own pipeline, on tiny random models of dev's and schnell's kinds."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import DefaultScope

from mmfgm.apis import FGMInferencer, export_generator, read_config
from mmfgm.apis.rehearsal import rehearse
from mmfgm.caches import CacheOptions, cache_latents, cache_prompts
from mmfgm.datasets import CachedLatents, CachedPrompts
from mmfgm.engine import SingleDeviceStrategy
from mmfgm.errors import UsageError
from mmfgm.flow import euler
from mmfgm.models import FGM, FlowMatching, LatentDecoder, Sampling
from mmfgm.models.families import FAMILIES, family_of, find
from mmfgm.models.families.flux import Flux, pack, unpack
from tests.conftest import ROOT
from tests.test_apis.conftest import make_problem
from tests.tiny_flux import CONFIG, make_tiny_flux
from tests.without_mmfgm import images_without_mmfgm

PROMPTS = ['a red cat', 'the blue house on a green tree']
FAMILY = FAMILIES['flux']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flux')
    return dict(
        dev=make_tiny_flux(folder / 'dev'), schnell=make_tiny_flux(folder / 'schnell', dev=False)
    )


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmfgm'):
        yield


def stock(folder, latents, **options):
    """The latents that diffusers' pipeline makes of noise ``(N, C, h, w)``."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    n, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, n, channels, height, width)
    pixels = dict(height=2 * height, width=2 * width)
    out = pipeline(PROMPTS, latents=packed, output_type='latent', **pixels, **options).images
    return FluxPipeline._unpack_latents(out, **pixels, vae_scale_factor=2)


@pytest.mark.parametrize(
    'kind, size, guidance',
    [('dev', 8, 3.5), ('dev', (4, 10), 7.0), ('schnell', 8, None), ('schnell', (6, 4), None)],
)
def test_sampling_is_the_pipelines(folders, kind, size, guidance):
    """8 Euler steps from the same noise, square or not."""
    folder = folders[kind]
    network = FAMILY.load(folder, latent_size=size, guidance=guidance).eval()
    z = torch.randn(2, *network.event_shape, generator=torch.Generator().manual_seed(0))
    cond = FAMILY.encode(folder, PROMPTS)
    times = FAMILY.times(8, latent_size=size, pretrained=folder)
    with torch.no_grad():
        ours = euler(lambda x, t: network(x, t, **cond), z, times)
    theirs = stock(folder, z, num_inference_steps=8, guidance_scale=guidance or 0.0)
    assert z.shape[2:] == ((size, size) if isinstance(size, int) else size) == ours.shape[2:]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_classifier_free_guidance_is_the_pipelines(folders, monkeypatch):
    """Beside the guidance that is an input; the pipeline calls it true CFG."""
    folder = folders['dev']
    null = {name: value[0] for name, value in FAMILY.null(FAMILY.encoder(folder)).items()}
    monkeypatch.setattr(
        'mmfgm.models.families.latents.CachedPrompts', lambda path: SimpleNamespace(null=null)
    )
    model = FlowMatching(
        dict(type='Flux', latent_size=8, pretrained=folder),
        time_sampler=dict(type='Uniform'),
        null_condition=dict(type='CachedNullPrompt', path='cache'),
    )
    batch = dict(idx=torch.arange(2), seed=[5, 6], cond=FAMILY.encode(folder, PROMPTS))
    ours = model.sample(batch, Sampling('network', 8, guidance=4.0, spacing='pipeline'))
    theirs = stock(
        folder,
        model.sampler.noise([5, 6]),
        num_inference_steps=8,
        negative_prompt=['', ''],
        true_cfg_scale=4.0,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    shift = FAMILY.shift_at(8, folder)
    other = model.sample(batch, Sampling('network', 8, shift=shift, guidance=4.0))
    assert (other - ours).abs().max() > 1e-3  # diffusers' grid is another one


def test_times_are_the_schedulers(folders):
    """Of dev at 1024 px by default, where exp(mu) is exp(1.15)."""
    assert math.isclose(FAMILY.shift_at(), math.exp(1.15))
    assert FAMILY.shift_at(8, folders['schnell']) == 1
    torch.testing.assert_close(
        FAMILY.times(4, pretrained=folders['schnell']), torch.tensor([1, 0.75, 0.5, 0.25, 0])
    )
    assert FAMILY.shift_at(8, folders['dev']) < FAMILY.shift_at((8, 10), folders['dev'])


def test_packing_is_the_pipelines():
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 6, 8), x)


def test_prompts_through_the_cache(folders, tmp_path):
    folder = folders['dev']
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    options = CacheOptions(dtype='fp32', batch_size=1, device='cpu')
    cache_prompts(
        str(tmp_path / 'prompts.txt'), str(tmp_path / 'out'), folder, options=options, max_length=9
    )
    cache = CachedPrompts(str(tmp_path / 'out'))
    items = cache.__getitems__(range(2))
    cond = FAMILY.encode(folder, PROMPTS, max_length=9)
    assert cond['prompt_embeds'].shape == (2, 9, 32)
    for name in cond:
        torch.testing.assert_close(items['cond'][name], cond[name])
        null = FAMILY.null(FAMILY.encoder(folder, max_length=9))[name][0]
        torch.testing.assert_close(cache.null[name], null)
    # by default as long as the pipeline's own
    network = FAMILY.load(folder, latent_size=8)
    live = {name: value.shape for name, value in FAMILY.encode(folder, PROMPTS).items()}
    assert {name: value.shape for name, value in network.dummy_conditions(2).items()} == live


def test_latents_and_images_as_in_the_pipeline(folders, tmp_path):
    from diffusers import FluxPipeline
    from PIL import Image

    folder = folders['dev']
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 6, 8)
    options = dict(num_inference_steps=2, height=12, width=16, latents=pack(latents))
    images = pipeline(PROMPTS, output_type='pt', **options).images
    made = pipeline(PROMPTS, output_type='latent', **options).images
    decoded = LatentDecoder(folder)(unpack(made, 6, 8))
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-4, atol=1e-5)
    # and back, through a cache of images
    (tmp_path / 'images').mkdir()
    pixels = (255 * torch.rand(16, 16, 3)).byte()
    Image.fromarray(pixels.numpy()).save(tmp_path / 'images' / 'a.png')
    source, out = str(tmp_path / 'images'), str(tmp_path / 'latents')
    cache_latents(source, out, folder, 16, options=CacheOptions(dtype='fp32', device='cpu'))
    with torch.no_grad():
        image = pipeline.image_processor.preprocess(Image.fromarray(pixels.numpy()))
        mean = pipeline.vae.encode(image).latent_dist.mean[0]
    expected = (mean - 0.1159) * 0.3611
    torch.testing.assert_close(CachedLatents(out, (4, 8, 8), prompts=False)[0]['x_0'], expected)


def conditions(n):
    return dict(
        prompt_embeds=torch.randn(n, 5, 32, dtype=torch.float64),
        pooled_embeds=torch.randn(n, 16, dtype=torch.float64),
    )


def build_fgm(dev=True, **network):
    """FGM with a GAN on random networks in float64."""
    config = dict(CONFIG, guidance_embeds=dev)
    return FGM(
        dict(type='Flux', latent_size=(4, 8), config=config, dtype='float64', **network),
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


def trained_by(model, phase, samples):
    """Names of the networks that a phase leaves gradients in."""
    model.zero_grad(set_to_none=True)
    frozen = [getattr(model, name) for name in model.phases[phase].freezes]
    with SingleDeviceStrategy.frozen(SingleDeviceStrategy(), frozen):
        losses = model.loss(phase, samples)
        sum(value for name, value in losses.items() if 'loss' in name).backward()
    return {
        name
        for name, network in model.networks.items()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    }


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_cycle_leaves_gradients_where_they_belong(checkpointing):
    model = build_fgm(checkpointing=checkpointing).train()
    cond, z = conditions(2), torch.randn(2, 4, 4, 8, dtype=torch.float64)
    real = dict(x_0=torch.randn_like(z), cond=conditions(2))
    x_0 = model.generator(z, **cond)
    samples = dict(cond=cond, x_0=x_0.detach(), real=real)
    assert trained_by(model, 'online', samples) == {'online', 'discriminator'}
    assert trained_by(model, 'generator', dict(samples, x_0=x_0)) == {'generator'}
    # every layer of the generator but none that is not there
    without = [n for n, p in model.generator.named_parameters() if p.grad is None]
    assert not without


def test_features_are_those_of_the_layer():
    """Of both kinds of blocks: what the whole network hands to the next block."""
    network, cond = build_fgm().teacher, conditions(2)
    x_t, t = torch.randn(2, 4, 4, 8, dtype=torch.float64), torch.rand(2)
    blocks = [
        *network.transformer.transformer_blocks,
        *network.transformer.single_transformer_blocks,
    ]
    seen, ran = [], []
    handles = [
        block.register_forward_hook(lambda m, a, out: seen.append(out[1])) for block in blocks
    ]
    v = network(x_t, t, **cond)
    for handle in handles:
        handle.remove()
    counters = [block.register_forward_hook(lambda m, a, out: ran.append(m)) for block in blocks]
    for layer in (1, 2, 3, 4):
        ran.clear()
        features = network(x_t, t, **cond, feature_layer=layer)
        assert features.shape == (2, network.feature_dim, 2, 4) and len(ran) == layer
        torch.testing.assert_close(features.flatten(2).transpose(1, 2), seen[layer - 1])
    several = network(x_t, t, **cond, feature_layer=(4, 1))
    torch.testing.assert_close(several[0], features)
    for handle in counters:
        handle.remove()
    assert torch.equal(network(x_t, t, **cond), v)  # the blocks are back


def test_names_of_blocks_and_layers():
    network = build_fgm().teacher
    classes = {type(module).__name__ for module in network.modules()}
    assert classes.issuperset(FAMILY.block_types)
    # every linear layer of a block has adapters, but those of the modulation
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and '_blocks.' in name and '.norm' not in name
    ]
    assert all(name.endswith(FAMILY.adapter_targets) for name in linear)
    for ending in FAMILY.adapter_targets:
        assert any(name.endswith(f'.{ending}') for name in linear)


def recipe(folder, **generator):
    """Text of the config of the recipe on a tiny pipeline, for sampling alone."""
    return f"""
_base_ = [{str(ROOT / 'configs/fgm/flux_1024_lora.py')!r}]
pretrained = {folder!r}
latent_size = 8
prompt_cache = 'nowhere'
model = dict(
    gan=None,
    network=dict(dtype='float32'),
    generator=dict({', '.join(f'{k}={v}' for k, v in generator.items())}))
"""


def noise(*shape):
    """Of the seeds 3 and 4."""
    seeds = (torch.Generator().manual_seed(seed) for seed in (3, 4))
    return torch.stack([torch.randn(*shape, generator=seed) for seed in seeds])


def with_guidance(latents, *scales):
    """One step, of 16 x 16 pixels, for each ``guidance_scale``."""
    options = dict(num_inference_steps=1, height=16, width=16, output_type='pt')
    return [
        dict(prompt=PROMPTS, guidance_scale=scale, latents=latents, **options) for scale in scales
    ]


def ours(config, weights=None):
    made = FGMInferencer(config, weights, device='cpu')(PROMPTS, seeds=[3, 4], out='tensor')
    return (torch.stack(made['predictions']) / 2 + 0.5).clamp(0, 1)


def with_adapters(folder, base, **generator):
    """A training's config and checkpoint, the adapters of random values."""
    folder.mkdir()
    problem = make_problem(folder, recipe(base, **generator))
    adapters = {name: p for name, p in problem.model.named_parameters() if 'lora_' in name}
    for p in adapters.values():
        p.data = 0.1 * torch.randn_like(p)
    torch.save(dict(state_dict=adapters), problem.weights)
    return problem


@pytest.mark.slow
def test_export_is_exact(folders, tmp_path):
    """Folded, whatever guidance_scale the pipeline is called with."""
    problem = with_adapters(tmp_path / 'run', folders['dev'], t_star=0.9, c_out=0.95, c_in=0.8)
    out = tmp_path / 'out'
    assert export_generator(read_config(problem.config), problem.weights, str(out)) == 'pipeline'
    images = ours(problem.config, problem.weights)
    calls = with_guidance(pack(noise(4, 8, 8)), 1.0, 3.5)
    for theirs in images_without_mmfgm(tmp_path, str(out), calls):
        torch.testing.assert_close(theirs, images, rtol=0, atol=1e-5)
    assert images.std() > 0.1
    torch.testing.assert_close(ours(str(out)), images, rtol=0, atol=1e-5)
    assert 'guidance_scale=3.5, height=64, width=64' in (out / 'README.md').read_text()


@pytest.mark.slow
def test_adapters_alone(folders, tmp_path):
    """With the guidance they were trained with, which their card names."""
    problem = with_adapters(tmp_path / 'run', folders['dev'], t_star=1.0, c_out=1.0, c_in=1.0)
    out = str(tmp_path / 'out')
    assert export_generator(read_config(problem.config), problem.weights, out, lora=True) == 'lora'
    images = ours(problem.config, problem.weights)
    calls = with_guidance(pack(noise(4, 8, 8)), 3.5, 9.0)
    right, wrong = images_without_mmfgm(tmp_path, folders['dev'], calls, out)
    torch.testing.assert_close(right, images, rtol=0, atol=1e-5)
    assert (wrong - images).abs().max() > 1e-4
    assert 'guidance_scale=3.5' in Path(out, 'README.md').read_text()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_folding(folders, dtype, tolerance):
    """Of schnell too, and in the pipeline's dtype with the rounding of its time."""
    from mmfgm.models import OneStepGenerator
    from mmfgm.models.families import PipelineStep

    for kind in ('dev', 'schnell'):
        network = FAMILY.load(folders[kind], latent_size=8)
        generator = OneStepGenerator(network, t_star=0.7, c_out=0.5, c_in=0.9)
        z, cond = torch.randn(2, 4, 8, 8), FAMILY.encode(folders[kind], PROMPTS)
        with torch.no_grad():
            x_0 = generator(z, **cond)
            step = FAMILY.step(folders[kind])
            assert step == PipelineStep(1000.0, 1.0, 1.0)
            network.transformer = FAMILY.fold(generator, step, dtype)
            network.guidance = network.guidance and 1.0
            folded = z - network(z, torch.ones(2), **cond)
        assert network.transformer.dtype == dtype
        torch.testing.assert_close(folded, x_0, rtol=0, atol=tolerance)


def test_the_family_is_found(folders, tmp_path):
    assert find(folders['dev']) is find(folders['schnell']) is FAMILY
    assert family_of('Flux') is FAMILY
    (tmp_path / 'model_index.json').write_text('{"_class_name": "FluxKontextPipeline"}')
    with pytest.raises(UsageError, match='is a FluxKontextPipeline, expected .*a FluxPipeline'):
        find(str(tmp_path))


def test_the_config_says_what_the_family_does():
    cfg = read_config(str(ROOT / 'configs/fgm/flux_1024_lora.py'))
    assert tuple(cfg.model.lora.target_modules) == FAMILY.adapter_targets
    assert cfg.default_hooks.samples.samplings['teacher, 28 NFE'].spacing == 'pipeline'
    full = read_config(str(ROOT / 'configs/fgm/flux_1024.py'))
    assert tuple(full.strategy.block_types) == FAMILY.block_types and not full.model.get('lora')
    for recipe in (cfg, full):
        assert recipe.model.decoder == FAMILY.decoder(recipe.pretrained)
        # an input of the network, so nothing guides beside it
        assert recipe.model.guidance is None and recipe.model.network.guidance == 3.5
        teacher = recipe.default_hooks.samples.samplings['teacher, 28 NFE']
        assert teacher.get('guidance') is None


def test_a_rehearsal(folders, tmp_path):
    (tmp_path / 'config.py').write_text(recipe(folders['dev']))
    cfg = read_config(str(tmp_path / 'config.py'))
    del cfg.optim_wrapper['discriminator']
    found = rehearse(cfg, gpus=1)
    numbers = sum(p.numel() for p in FAMILY.load(folders['dev']).parameters())
    assert found.parameters['teacher'] == numbers and found.peak.peak_bytes['activations'] > 0


def test_bad_input(folders, tmp_path):
    with pytest.raises(UsageError, match='no guidance for a network .* found guidance=3.5'):
        Flux(8, pretrained=folders['schnell'], guidance=3.5)
    with pytest.raises(UsageError, match='even sides, .* found 8 x 7'):
        Flux((8, 7), pretrained=folders['dev'])
    with pytest.raises(UsageError, match='either pretrained .* or config'):
        Flux(8)
    with pytest.raises(UsageError, match='has the 16 channels of its input, found 8'):
        Flux(8, config=dict(CONFIG, out_channels=8))
    with pytest.raises(UsageError, match='layers 1 to 4'):
        Flux(8, config=CONFIG).check_feature_layer(5)
    with pytest.raises(UsageError, match='at most 512, but is 513'):
        FAMILY.encoder(folders['dev'], max_length=513)
    with pytest.raises(UsageError, match='which are max_length, dtype, found without_t5'):
        FAMILY.encoder(folders['dev'], without_t5=True)
    encoder = FAMILY.encoder(folders['dev'], max_length=4)
    assert encoder.bad(['a cat', '', 3, PROMPTS[1]]) == {
        1: 'is empty',
        2: 'is not text but 3',
        3: 'has 9 T5 tokens, more than 4',
    }
    shutil.copytree(folders['dev'], tmp_path / 'half')
    index = json.loads((tmp_path / 'half' / 'model_index.json').read_text())
    index['text_encoder_2'] = [None, None]
    (tmp_path / 'half' / 'model_index.json').write_text(json.dumps(index))
    with pytest.raises(UsageError, match='has no text_encoder_2; download all of it'):
        FAMILY.encoder(str(tmp_path / 'half'))


def test_adapters_of_another_family(folders, tmp_path):
    problem = with_adapters(tmp_path / 'run', folders['dev'], t_star=1.0, c_out=1.0, c_in=1.0)
    others = {
        f'{network}.layers.0.attention.{layer}.lora_{side}.weight': torch.randn(4, 4)
        for network in ('online', 'generator.network', 'generator_ema.network')
        for layer in ('to_q', 'to_k')
        for side in 'AB'
    }
    torch.save(dict(state_dict=others), problem.weights)
    out = tmp_path / 'out'
    for use in (
        lambda: ours(problem.config, problem.weights),
        lambda: export_generator(read_config(problem.config), problem.weights, str(out)),
    ):
        with pytest.raises(
            UsageError, match='of another architecture .* is missing from it'
        ) as found:
            use()
        assert problem.weights in str(found.value) and ';' in str(found.value)
    assert not out.exists()
