# Copyright (c) mmfgm authors.
"""SD3's family against diffusers, and a second family, made here, through all that asks families:
caches, training, the inferencer, export and the estimate of memory."""

import json

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

from mmfgm.apis import FGMInferencer, OneStepPipeline, export_generator, read_config
from mmfgm.apis.rehearsal import rehearse
from mmfgm.caches import CacheOptions, cache_latents, cache_prompts
from mmfgm.datasets import CachedLatents, CachedPrompts
from mmfgm.engine import FlowRunner
from mmfgm.errors import UsageError
from mmfgm.models.families import (
    FAMILIES,
    DiffusersFamily,
    LatentEncoder,
    PromptEncoder,
    family_of,
    find,
    load_pretrained,
    register_family,
)
from mmfgm.registry import MODELS, TASK_UTILS
from tests.conftest import ROOT
from tests.tiny_sd3 import make_tiny_sd3

PROMPTS = ['a red cat', 'a blue dog', 'two birds', 'a house']


# A second family: everything between this line and the next one is all that its author writes.
class TinyTransformer(ModelMixin, ConfigMixin):
    """As Z-Image does it, time is 1 at the data and the sign is the other one."""

    @register_to_config
    def __init__(self, width=16, sample_size=4):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.time, self.text = nn.Linear(1, width), nn.Linear(8, width)

    def forward(self, x, time, words):
        at = self.time(time[:, None]) + self.text(words)
        return self.leave(torch.tanh(self.enter(x) + at[:, :, None, None]))


class TinyText(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, letters=256):
        super().__init__()
        self.table = nn.Embedding(letters, 8)

    def forward(self, text):
        return self.table(torch.tensor(list(text.encode()), dtype=torch.int64)).sum(0)


@MODELS.register_module()
class TinyNet(nn.Module):
    def __init__(self, pretrained=None, config=None):
        super().__init__()
        self.transformer = (
            TinyTransformer(**config)
            if pretrained is None
            else load_pretrained(TinyTransformer, pretrained, 'transformer')
        )
        size = self.transformer.config.sample_size
        self.event_shape = (3, size, size)

    def dummy_conditions(self, batch_size):
        return dict(words=torch.zeros(batch_size, 8))

    def forward(self, x_t, t, words):
        return -self.transformer(x_t, 1 - t, words.float())


class TinyEncoder(PromptEncoder):
    def __init__(self, pretrained, dtype='float32'):
        self.text = load_pretrained(TinyText, pretrained, 'text_encoder')
        self.components, self.dtype = dict(text=self.text), getattr(torch, dtype)

    @torch.no_grad()
    def encode(self, prompts):
        return dict(words=torch.stack([self.text(prompt) for prompt in prompts]).to(self.dtype))


class TinyLatents(LatentEncoder):
    factor, channels = 2, 3

    def encode(self, images):
        return avg_pool2d(images, 2)


@TASK_UTILS.register_module()
class TinyDecoder:
    def __init__(self, pretrained):
        self.pretrained = pretrained

    def __call__(self, latents):
        return interpolate(latents, scale_factor=2)


class TinyPipeline:
    """What the model card of an export names."""


@register_family
class TinyFamily(DiffusersFamily):
    name, title = 'tiny', 'Tiny'
    network, prompt_encoder = TinyNet, TinyEncoder
    pipelines = ('TinyPipe',)
    folds = True

    def network_type(self):
        return TinyTransformer

    def pipeline_type(self):
        return TinyPipeline

    def latent_encoder(self, pretrained):
        return TinyLatents()

    def decoder(self, pretrained):
        return dict(type='TinyDecoder', pretrained=pretrained)

    def exported(self, network):
        return dict(type='TinyNet')

    @torch.no_grad()
    def fold(self, generator, step, dtype, trained_in=torch.float32):
        step.check(generator)
        module = generator.network.transformer
        module.enter.weight.mul_(generator.c_in)
        for p in module.leave.parameters():
            p.mul_(generator.c_out / step.scale)
        module.time.bias.add_(module.time.weight[:, 0] * (step.timestep / 1000 - generator.t_star))
        return module.to(dtype)


# The end of the second family.


@pytest.fixture(scope='module')
def sd3(tmp_path_factory):
    return make_tiny_sd3(tmp_path_factory.mktemp('sd3') / 'base')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A pre-trained model of the second family in a folder of diffusers' format."""
    folder = tmp_path_factory.mktemp('tiny') / 'base'
    torch.manual_seed(0)
    TinyTransformer().save_pretrained(folder / 'transformer')
    TinyText().save_pretrained(folder / 'text_encoder')
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / 'scheduler')
    parts = dict(
        transformer=['tiny', 'TinyTransformer'],
        text_encoder=['tiny', 'TinyText'],
        scheduler=['diffusers', 'FlowMatchEulerDiscreteScheduler'],
    )
    index = dict(_class_name='TinyPipeline', **parts)
    (folder / 'model_index.json').write_text(json.dumps(index))
    return str(folder)


@pytest.fixture(scope='module')
def caches(tiny, tmp_path_factory):
    """Its prompts and images, encoded."""
    folder = tmp_path_factory.mktemp('caches')
    (folder / 'prompts.txt').write_text('\n'.join(PROMPTS))
    (folder / 'images').mkdir()
    rng = np.random.default_rng(0)
    for i, prompt in enumerate(PROMPTS):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / f'{i}.png')
        (folder / 'images' / f'{i}.txt').write_text(prompt)
    options = CacheOptions(dtype='fp32', batch_size=3, device='cpu')
    cache_prompts(str(folder / 'prompts.txt'), str(folder / 'prompts'), tiny, options=options)
    cache_latents(str(folder / 'images'), str(folder / 'latents'), tiny, 8, 'txt', options=options)
    return folder


def config_of(tiny, caches, work_dir, t_star=0.9):
    """The recipe of the distillation of SD3, with the second family in it."""
    cfg = read_config(str(ROOT / 'configs/fgm/sd3_1024.py'))
    cfg.merge_from_dict(
        dict(
            model=dict(
                network=dict(_delete_=True, type='TinyNet', pretrained=tiny),
                decoder=dict(_delete_=True, type='TinyDecoder', pretrained=tiny),
                guidance=dict(null=dict(path=str(caches / 'prompts'))),
                generator=dict(t_star=t_star, c_out=t_star, c_in=0.8),
                gan=None,
            ),
            strategy=dict(_delete_=True, type='SingleDeviceStrategy'),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                dataset=dict(_delete_=True, type='CachedPrompts', path=str(caches / 'prompts')),
            ),
            train_cfg=dict(max_iters=2, accumulation=1),
            optim_wrapper=dict(
                online=dict(optimizer=dict(lr=1e-2)), generator=dict(optimizer=dict(lr=1e-2))
            ),
            evaluations=None,
            default_hooks=dict(samples=None, watch=None, checkpoint=dict(interval=2)),
            work_dir=str(work_dir),
        )
    )
    del cfg.optim_wrapper['discriminator']
    return cfg


@pytest.fixture(scope='module')
def trained(tiny, caches, tmp_path_factory):
    cfg = config_of(tiny, caches, tmp_path_factory.mktemp('run'))
    runner = FlowRunner.from_cfg(cfg)
    runner.train()
    return cfg, runner.model


def test_the_right_family_is_found(sd3, tiny, tmp_path):
    assert find(sd3) is FAMILIES['sd3'] and find(tiny) is FAMILIES['tiny']
    assert family_of('TinyNet') is FAMILIES['tiny'] and family_of('AdaLNMLP') is None
    (tmp_path / 'model_index.json').write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(UsageError, match='is a OtherPipeline, expected .*a StableDiffusion3'):
        find(str(tmp_path))


def test_sd3s_family_is_what_its_pipeline_does(sd3):
    from diffusers import StableDiffusion3Pipeline

    family, pipeline = find(sd3), StableDiffusion3Pipeline.from_pretrained(sd3)
    pipeline.scheduler.set_timesteps(7)
    torch.testing.assert_close(family.times(7), pipeline.scheduler.sigmas)
    with torch.no_grad():
        embeds, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, None, None)
    cond = family.encode(sd3, PROMPTS)
    assert torch.equal(cond['prompt_embeds'], embeds) and torch.equal(cond['pooled_embeds'], pooled)
    none = family.null(family.encoder(sd3))
    torch.testing.assert_close(none['prompt_embeds'][0], null[0])
    torch.testing.assert_close(none['pooled_embeds'][0], null_pooled[0])
    network = family.load(sd3)
    x_t, t = torch.randn(4, *network.event_shape), torch.rand(4)
    with torch.no_grad():
        v = network(x_t, t, **cond)
        expected = pipeline.transformer(x_t, embeds, pooled, 1000 * t, return_dict=False)[0]
    assert torch.equal(v, expected)
    dummies = network.dummy_conditions(4)
    assert {k: v.shape for k, v in dummies.items()} == {k: v.shape for k, v in cond.items()}


def test_configs_of_sd3_say_what_its_family_does():
    """Configs list these, so that a user sees and can change them."""
    family = FAMILIES['sd3']
    cfg = read_config(str(ROOT / 'configs/fgm/sd3_1024.py'))
    assert tuple(cfg.strategy.block_types) == family.block_types
    teacher = cfg.default_hooks.samples.samplings['teacher, 28 NFE']
    assert teacher.spacing == 'pipeline' and teacher.get('shift') is None
    lora = read_config(str(ROOT / 'configs/fgm/sd3_512_lora_1xb4.py')).model.lora
    assert tuple(lora.target_modules) == family.adapter_targets


def test_options_that_a_family_does_not_have(tiny, caches, tmp_path):
    with pytest.raises(UsageError, match='encoder of Tiny, which are dtype, found max_length'):
        cache_prompts(str(caches / 'prompts.txt'), str(tmp_path / 'x'), tiny, max_length=7)


def test_second_family_through_the_caches(tiny, caches):
    cond = find(tiny).encode(tiny, PROMPTS)
    prompts = CachedPrompts(str(caches / 'prompts'))
    latents = CachedLatents(str(caches / 'latents'), (3, 4, 4))
    for cache in (prompts, latents):
        items = cache.__getitems__(range(4))
        assert torch.equal(items.get('cond', items)['words'], cond['words'])
    assert torch.equal(prompts.null['words'], torch.zeros(8))
    image = torch.from_numpy(np.array(Image.open(caches / 'images' / '2.png')))
    expected = avg_pool2d(image.permute(2, 0, 1) / 127.5 - 1, 2)
    torch.testing.assert_close(latents[2]['x_0'], expected)


def test_second_family_through_training_and_the_inferencer(tiny, trained):
    cfg, model = trained
    before = TinyTransformer.from_pretrained(f'{tiny}/transformer')
    assert not torch.equal(model.generator.network.transformer.leave.bias, before.leave.bias)
    z = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5))])
    words = find(tiny).encode(tiny, ['a red cat'])['words']
    with torch.no_grad():
        x_0 = z + 0.9 * model.generator_ema.network.transformer(
            0.8 * z, torch.tensor([1 - 0.9]), words
        )
    inferencer = FGMInferencer(cfg, cfg.work_dir, device='cpu')
    (sample,) = inferencer('a red cat', seeds=5, out='tensor')['predictions']
    torch.testing.assert_close(sample, interpolate(x_0, scale_factor=2)[0])
    # guidance asks the family's encoder for "no prompt"
    (guided,) = inferencer(
        'a red cat', seeds=5, out='tensor', network='teacher', nfe=1, guidance=3.0, shift=3.0
    )['predictions']
    with torch.no_grad():
        v, v_null = -before(z, torch.zeros(1), words), -before(z, torch.zeros(1), 0 * words)
    expected = z - (v_null + 3 * (v - v_null))
    torch.testing.assert_close(guided, interpolate(expected, scale_factor=2)[0])


@pytest.mark.parametrize('folds', [True, False])
def test_second_family_through_export(trained, tmp_path, monkeypatch, folds):
    """As its own pipeline, whose one step is the generator; and, of a family that cannot fold, as
    one file."""
    cfg, _ = trained
    monkeypatch.setattr(TinyFamily, 'folds', folds)
    out = tmp_path / 'out'
    kind = export_generator(cfg, cfg.work_dir, str(out))
    assert kind == ('pipeline' if folds else 'generator')
    images = OneStepPipeline.from_pretrained(str(out), device='cpu')(
        prompt=PROMPTS, seeds=3, output_type='tensor'
    ).images
    expected = FGMInferencer(cfg, cfg.work_dir, device='cpu')(PROMPTS, seeds=3, out='tensor')
    for image, other in zip(images, expected['predictions']):
        torch.testing.assert_close(image, other, rtol=1e-5, atol=1e-5)
    if not folds:
        # its architecture is stated, so that the weights of the base are not needed
        export = json.loads((out / 'mmfgm_export.json').read_text())
        assert 'pretrained' not in export['model']['network']
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder='scheduler')
        scheduler.set_timesteps(1)
        module = TinyTransformer.from_pretrained(out / 'transformer')
        z = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        time = 1 - scheduler.timesteps[:1] / 1000
        with torch.no_grad():
            v = -module(z, time, FAMILIES['tiny'].encode(str(out), PROMPTS[:1])['words'])
        x_0 = scheduler.step(v, scheduler.timesteps[0], z).prev_sample
        torch.testing.assert_close(interpolate(x_0, scale_factor=2)[0], images[0])
        assert 'from tests import TinyPipeline' in (out / 'README.md').read_text()


def test_second_family_through_a_rehearsal(tiny, caches, tmp_path):
    found = rehearse(config_of(tiny, caches, tmp_path), gpus=1)
    numbers = sum(p.numel() for p in TinyTransformer().parameters())
    assert found.parameters['teacher'] == numbers and found.peak.peak_bytes['activations'] > 0
