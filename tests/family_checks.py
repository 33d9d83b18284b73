# Copyright (c) mmfgm authors.
"""What every family over a stock pipeline must show, whatever the pipeline."""

import json

import torch
from mmengine.registry import DefaultScope

from mmfgm.apis import FGMInferencer, export_generator, read_config
from mmfgm.caches import CacheOptions, cache_prompts
from mmfgm.datasets import CachedPrompts
from mmfgm.engine import SingleDeviceStrategy
from mmfgm.flow import euler
from mmfgm.models import FGM
from mmfgm.models.families import CachedNullPrompt, find
from mmfgm.models.lora import LoRA
from tests.conftest import ROOT
from tests.tiny_flux import make_tiny_flux
from tests.tiny_flux2 import make_tiny_flux2
from tests.tiny_lumina2 import make_tiny_lumina2
from tests.tiny_qwen_image import make_tiny_qwen_image
from tests.tiny_sana import make_tiny_sana
from tests.tiny_sd3 import SD35, make_tiny_sd3
from tests.tiny_z_image import make_tiny_z_image
from tests.without_mmfgm import images_without_mmfgm

PROMPTS = ['a red cat', 'the blue house on a green tree']
SEEDS = [3, 4]
# what makes a pipeline of each family in a folder
TINY = dict(
    sd3=make_tiny_sd3,
    sd35=lambda folder: make_tiny_sd3(folder, **SD35),
    sana=make_tiny_sana,
    lumina2=make_tiny_lumina2,
    flux=make_tiny_flux,
    flux2=lambda folder: make_tiny_flux2(folder, dev=False),
    qwen_image=make_tiny_qwen_image,
    z_image=make_tiny_z_image,
)


def noise(*shape, seeds=SEEDS):
    """Of each seed its own."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def integrate(folder, z, guidance, times):
    """Our ODE with the family's network, prompts and "no prompt".

    Args:
        folder (str): The pipeline.
        z (Tensor): Noise of each of ``PROMPTS``.
        guidance (Callable): ``null`` to a guidance.
        times (Tensor): Of the solver.
    """
    family = find(folder)
    network, encoder = family.load(folder), family.encoder(folder)
    cond, null = encoder.encode(PROMPTS), family.null(encoder)

    def to_null(cond):
        return {name: value.expand_as(cond[name]) for name, value in null.items()}

    guide = guidance(to_null)
    return euler(lambda x, t: guide(network, x, t, cond), z, times)


def make_cache(folder, out, prompts=PROMPTS):
    """A cache of prompts in ``out``, a folder; its path."""
    (out / 'prompts.txt').write_text('\n'.join(prompts))
    options = CacheOptions(dtype='fp32', batch_size=2, device='cpu')
    cache_prompts(str(out / 'prompts.txt'), str(out / 'cache'), folder, options=options)
    return str(out / 'cache')


def check_cache(folder, cache, prompts=PROMPTS):
    """Velocities under prompts of a cache, and under its null prompt, are those under prompts
    encoded here; padding is not stored."""
    family = find(folder)
    encoder, network = family.encoder(folder), family.load(folder)
    cached = CachedPrompts(cache).__getitems__(range(len(prompts)))['cond']
    live = encoder.encode(prompts)
    mask = live['prompt_mask'].bool()
    assert torch.equal(cached['prompt_mask'], live['prompt_mask'])
    torch.testing.assert_close(cached['prompt_embeds'][mask], live['prompt_embeds'][mask])
    assert not cached['prompt_embeds'][~mask].any() and live['prompt_embeds'][~mask].any()
    x_t, t = torch.randn(len(prompts), *network.event_shape), torch.rand(len(prompts))
    null = {k: v.expand_as(live[k]) for k, v in family.null(encoder).items()}
    with torch.no_grad():
        for ours, theirs in ((cached, live), (CachedNullPrompt(cache)(cached), null)):
            v, expected = network(x_t, t, **ours), network(x_t, t, **theirs)
            torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-5)
    assert (network(x_t, t, **live) - network(x_t, t, **null)).abs().max() > 1e-3


def check_cycle(folder, cache, feature_layer, **guidance):
    """The online phase leaves gradients in the online network and the head, the generator's in the
    generator."""
    family = find(folder)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmfgm'):
        model = FGM(
            dict(type=family.network.__name__, pretrained=folder),
            teacher=dict(checkpoint=None),
            fm_time_sampler=dict(type='LogitNormal', mean=-1.0, std=2.0),
            fgm_time_sampler=dict(type='LogitNormal', mean=2.4, std=1.0),
            generator=dict(t_star=0.97, c_in=0.8),
            loss=dict(type='FGMLoss', l1_weight=0.0),
            guidance=dict(
                type='ClassifierFreeGuidance',
                scale=4.0,
                null=dict(type='CachedNullPrompt', path=cache),
                **guidance,
            ),
            gan=dict(
                feature_layer=feature_layer,
                time_sampler=dict(type='LogitNormal', mean=-1.0, std=1.0),
                head=dict(type='ConvDiscriminator', channels=8),
            ),
        )
    with torch.no_grad():
        for p in model.online.parameters():  # or u - v would be 0 without guidance
            p.add_(0.01 * torch.randn_like(p))
    cond = CachedPrompts(cache).__getitems__(range(2))['cond']
    shape = model.generator.network.event_shape
    real = dict(x_0=torch.randn(2, *shape), cond=cond)
    z = torch.randn(2, *shape)

    def touched(phase, x_0):
        """The networks that the gradient of each loss reaches."""
        losses = model.loss(phase, dict(x_0=x_0, cond=cond, real=real))
        reached = {}
        for loss in sorted(name for name in losses if 'loss' in name):
            model.zero_grad(set_to_none=True)
            losses[loss].backward(retain_graph=True)
            reached[loss] = {
                name
                for name, network in model.networks.items()
                if any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
            }
        return reached

    x_0 = model.generator(z, **cond)
    assert touched('online', x_0) == dict(loss_fm={'online'}, loss_d={'online', 'discriminator'})
    with SingleDeviceStrategy.frozen(SingleDeviceStrategy(), [model.online, model.discriminator]):
        assert touched('generator', x_0) == dict(loss_fgm={'generator'}, loss_g={'generator'})
    without = [n for n, p in model.generator.network.named_parameters() if p.grad is None]
    assert not without


def check_features(network, cond, block_output, layers):
    """Features are what the layers return, of one and of several, and recomputed too.

    Args:
        network (DiffusersNetwork): Of 2 layers or more.
        cond (dict[str, Tensor]): Of 2 prompts.
        block_output (Callable): What a block returned, to image tokens ``(N, h w, D)``.
        layers (nn.ModuleList): The blocks.
    """
    x_t, t = torch.randn(2, *network.event_shape), torch.rand(2)
    outputs = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: outputs.append(out)) for layer in layers
    ]
    network(x_t, t, **cond)
    for handle in handles:
        handle.remove()
    expected = [block_output(out) for out in outputs]
    for _ in range(2):
        found = network(x_t, t, **cond, feature_layer=(2, 1))
        for layer, features in zip((2, 1), found):
            tokens = features.flatten(2).transpose(1, 2)
            torch.testing.assert_close(tokens, expected[layer - 1])
            one = network(x_t, t, **cond, feature_layer=layer)
            torch.testing.assert_close(one, features)
            assert features.shape[1] == network.feature_dim
        found[0].square().sum().backward()
        network.transformer.enable_gradient_checkpointing()
    # later layers are not run, and they are there again
    ran = []
    handle = layers[1].register_forward_hook(lambda *args: ran.append(1))
    network(x_t, t, **cond, feature_layer=1)
    assert not ran
    network(x_t, t, **cond)
    assert ran
    handle.remove()


def check_names(network, family):
    """Sharding finds the blocks and adapters the layers, by the names that the configs list too."""
    classes = {type(module).__name__ for module in network.modules()}
    assert set(family.block_types) <= classes
    names = [name for name, _ in network.named_modules()]
    for target in family.adapter_targets:
        assert any(name.endswith(f'.{target}') for name in names), target
    cfg, lora = (
        read_config(str(ROOT / f'configs/fgm/{family.name}_1024{kind}.py'))
        for kind in ('', '_lora_1xb4')
    )
    assert tuple(cfg.strategy.block_types) == family.block_types
    assert tuple(lora.model.lora.target_modules) == family.adapter_targets
    assert cfg.model.network.type == family.network.__name__
    assert cfg.model.decoder == family.decoder(cfg.pretrained)
    samplings = cfg.default_hooks.samples.samplings.values()
    assert [s.spacing for s in samplings if s.network == 'teacher'] == ['pipeline']
    assert LoRA(**lora.model.lora).adapted(network) is not network


def check_export(folder, pipeline_class, tmp_path, t_star, c_in, config, **call):
    """The stock pipeline's one step with an export is the generator, and the images are equal, in a
    process without mmfgm."""
    family = find(folder)
    (tmp_path / 'config.py').write_text(f"""
_base_ = [{str(ROOT / config)!r}]
pretrained = {folder!r}
latent_size = None
prompt_cache = 'nowhere'
model = dict(
    gan=None,
    network=dict(dtype='float32'),
    generator=dict(t_star={t_star}, c_in={c_in}, c_out={t_star}))
""")
    cfg = read_config(str(tmp_path / 'config.py'))
    cfg.model.pop('lora', None)
    with DefaultScope.overwrite_default_scope('mmfgm'):
        model = FGM.build(
            {**cfg.model, 'guidance': None, 'decoder': None}, networks=('generator_ema',)
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.generator_ema.parameters():
            p.add_(0.05 * torch.randn_like(p))
    weights = str(tmp_path / 'trained.pth')
    torch.save(dict(state_dict=model.state_dict()), weights)
    kind = export_generator(cfg, weights, str(tmp_path / 'out'))
    assert kind == 'pipeline'
    assert json.loads((tmp_path / 'out' / 'model_index.json').read_text())['_class_name'] == (
        pipeline_class.__name__
    )
    network = model.generator_ema.network
    z = noise(*network.event_shape)
    call = dict(prompt=PROMPTS, num_inference_steps=1, guidance_scale=1.0, latents=z, **call)
    calls = [dict(call, output_type='latent'), dict(call, output_type='pt')]
    theirs, decoded = images_without_mmfgm(tmp_path, str(tmp_path / 'out'), calls)
    with torch.no_grad():
        ours = model.generator_ema(z, **family.encode(folder, PROMPTS))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    images = FGMInferencer(str(tmp_path / 'out'), device='cpu')(PROMPTS, seeds=SEEDS, out='tensor')
    for image, expected in zip(images['predictions'], decoded):
        torch.testing.assert_close((image / 2 + 0.5).clamp(0, 1), expected, rtol=1e-4, atol=1e-4)
