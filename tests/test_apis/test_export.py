# Copyright (c) mmfgm authors.
"""Exports against FGMInferencer: the SD3 ones opened by plain diffusers, where mmfgm cannot be
imported."""

import filecmp
import json
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from mmengine.registry import DefaultScope
from safetensors.torch import load_file

from mmfgm.apis import FGMInferencer, OneStepPipeline, export_generator, read_config
from mmfgm.apis.sampling_model import SamplingModel
from mmfgm.errors import UsageError
from mmfgm.models import Sampling
from tests.conftest import LIMIT, ROOT, tool_env
from tests.test_apis.conftest import make_problem, sd3_config
from tests.tiny_sd3 import SD35, make_tiny_sd3
from tests.without_mmfgm import BLOCKED

PROMPTS = ['a red cat', 'the blue house on a green tree']
SEEDS = [3, 4]
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
CASES = list(product([0.5, 0.97, 1.0], [0.8, 1.0]))

STOCK = f"""{BLOCKED}
import json
import torch
from diffusers import StableDiffusion3Pipeline

for folder, dtype, prompts, noise, out, options in json.load(open(sys.argv[1])):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    options = dict(options, guidance_scale=1.0, output_type='pt')
    torch.manual_seed(5)
    images = pipe(prompts, latents=torch.load(noise).to(pipe.dtype), **options)
    torch.save(images.images.float(), out)
try:
    import mmfgm
except ImportError:
    print('without mmfgm')
"""


def to_unit(samples):
    """As diffusers hands images out: in [0, 1]."""
    return (torch.stack(samples) / 2 + 0.5).clamp(0, 1)


def images_of(model, weights=None, prompts=PROMPTS, **options):
    return to_unit(
        FGMInferencer(model, weights)(prompts, seeds=SEEDS, out='tensor', **options)['predictions']
    )


def stock(folder, dtype='fp32', lora=None):
    """Images of plain diffusers from the same noise."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype])
    if lora:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.transformer.config.sample_size
    noise = torch.stack(
        [
            torch.randn(16, size, size, generator=torch.Generator().manual_seed(seed))
            for seed in SEEDS
        ]
    )
    with torch.no_grad():
        return pipe(
            PROMPTS,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=noise.to(pipe.dtype),
            output_type='pt',
        ).images


@pytest.fixture(scope='module')
def exports(sd3_folder, tmp_path_factory):
    """Every case exported in both dtypes, and what diffusers makes of it in a process without
    mmfgm."""
    folder, cases, jobs = tmp_path_factory.mktemp('exports'), {}, []
    torch.save(
        torch.stack(
            [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
        ),
        folder / 'noise',
    )
    for t_star, c_in in CASES:
        case = folder / f'{t_star}_{c_in}'
        case.mkdir()
        problem = make_problem(case, sd3_config(sd3_folder, t_star=t_star, c_in=c_in, c_out=t_star))
        for dtype in DTYPES:
            out = str(case / dtype)
            export_generator(read_config(problem.config), problem.weights, out, dtype=dtype)
            jobs.append(
                [
                    out,
                    str(DTYPES[dtype]).removeprefix('torch.'),
                    PROMPTS,
                    str(folder / 'noise'),
                    f'{out}.pt',
                    dict(num_inference_steps=1),
                ]
            )
        cases[t_star, c_in] = SimpleNamespace(problem=problem, folder=case)
    run_stock(folder, jobs)
    return cases


def run_stock(folder, jobs):
    """What diffusers makes of each job, in a process that cannot import mmfgm."""
    (folder / 'jobs.json').write_text(json.dumps(jobs))
    env = {key: value for key, value in tool_env().items() if key != 'PYTHONPATH'}
    result = subprocess.run(
        [sys.executable, '-I', '-c', STOCK, str(folder / 'jobs.json')],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0 and result.stdout.strip() == 'without mmfgm', result.stderr[
        -3000:
    ]


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_stock_diffusers_makes_our_image(exports, case):
    problem, folder = exports[case].problem, exports[case].folder
    ours, theirs = images_of(problem.config, problem.weights), torch.load(folder / 'fp32.pt')
    assert theirs.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    # and so does FGMInferencer, of the folder alone
    torch.testing.assert_close(images_of(str(folder / 'fp32')), ours, rtol=0, atol=1e-5)
    # with the config beside it, it compares with the teacher
    both = FGMInferencer(problem.config, str(folder / 'fp32'))
    teacher = to_unit(
        both(PROMPTS, seeds=SEEDS, out='tensor', network='teacher', nfe=2, guidance=3.0)[
            'predictions'
        ]
    )
    expected = images_of(problem.config, problem.weights, network='teacher', nfe=2, guidance=3.0)
    assert both.networks == ['generator_ema', 'teacher'] and torch.equal(teacher, expected)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_bf16_is_off_by_its_rounding(exports, case, sd3_folder):
    """No more than the generator itself, not folded, with its weights and all it computes rounded
    to bf16."""
    problem, folder = exports[case].problem, exports[case].folder
    ours, theirs = images_of(problem.config, problem.weights), torch.load(folder / 'bf16.pt')
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder, torch_dtype=torch.bfloat16)
    generator = problem.model.generator_ema
    state = {
        key: value.bfloat16() for key, value in generator.network.transformer.state_dict().items()
    }
    pipe.transformer.load_state_dict(state)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False
        )
        z, t = torch.load(folder.parent / 'noise'), torch.full((2,), 1000 * generator.t_star)
        v = pipe.transformer((generator.c_in * z).bfloat16(), embeds, pooled, t, return_dict=False)[
            0
        ]
        latents = (
            z - generator.c_out * v.float()
        ).bfloat16() / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        rounded = to_unit(list(pipe.vae.decode(latents).sample.float()))
    off, expected = (theirs - ours).abs(), (rounded - ours).abs()
    assert (
        0 < expected.mean() < 0.01
        and off.mean() < 1.3 * expected.mean()
        and off.max() < 3 * expected.max()
    )


@pytest.mark.slow
def test_only_the_transformer_differs(exports, sd3_folder):
    out = exports[0.97, 0.8].folder / 'fp32'
    compared = filecmp.dircmp(sd3_folder, out)
    assert not compared.left_only and set(compared.right_only) == {'README.md', 'mmfgm_export.json'}
    assert not compared.diff_files
    for name, part in compared.subdirs.items():
        assert not part.left_only and not part.right_only
        assert part.diff_files == (
            ['diffusion_pytorch_model.safetensors'] if name == 'transformer' else []
        ), name
        assert not filecmp.cmpfiles(
            f'{sd3_folder}/{name}', out / name, part.same_files, shallow=False
        )[1]
    base, folded = (
        load_file(f'{folder}/transformer/diffusion_pytorch_model.safetensors')
        for folder in (sd3_folder, out)
    )
    assert base.keys() == folded.keys()


def test_other_sizes_shards_and_cards(sd3_folder, tmp_path):
    """Latents of half the base's size, which the pipeline must take without being told."""
    base = make_tiny_sd3(tmp_path / 'base', seed=1)
    (tmp_path / 'base' / 'README.md').write_text(
        '---\nlicense: other\nlicense_name: tiny-community\n---\nA base.\n'
    )
    problem = make_problem(
        tmp_path,
        sd3_config(sd3_folder, t_star=0.97, c_in=0.8).replace('latent_size = 8', 'latent_size = 4'),
    )
    out = str(tmp_path / 'out')
    assert (
        export_generator(
            read_config(problem.config), problem.weights, out, base, 'generator', 'fp32', '100KB'
        )
        == 'pipeline'
    )
    assert (tmp_path / 'out/transformer/diffusion_pytorch_model.safetensors.index.json').is_file()
    theirs = stock(out)
    assert theirs.shape == (2, 3, 8, 8)
    cfg = read_config(problem.config)
    cfg.merge_from_dict(
        {
            'model.decoder.pretrained': base,
            'text_encoder': dict(type='SD3TextEncoder', pretrained=base),
        }
    )
    torch.testing.assert_close(
        theirs, images_of(cfg, problem.weights, network='generator'), rtol=0, atol=1e-5
    )
    card = (tmp_path / 'out/README.md').read_text()
    assert (
        card.startswith('---\nlibrary_name: diffusers\n')
        and 'tiny-community, other' in card
        and str(tmp_path) not in card
    )
    assert '\nlicense_name: tiny-community\nlicense: other\n' in card.split('---')[1]
    shards = json.loads((tmp_path / 'out/mmfgm_export.json').read_text())['weights_sha256']
    assert len(shards) > 2 and all(digest in card for digest in shards.values())


@pytest.mark.parametrize('dtype, tolerance', [('fp32', 0), ('bf16', 0.05), ('fp16', 0.005)])
def test_class_generator(digits, tmp_path, dtype, tolerance):
    cfg, out = read_config(digits.config), str(tmp_path / 'out')
    assert export_generator(cfg, digits.weights, out, dtype=dtype) == 'generator'
    labels, seeds = list(range(10)), list(range(20, 30))
    expected = torch.stack(
        FGMInferencer(cfg, digits.weights)(labels, seeds, out='tensor')['predictions']
    )
    pipe = OneStepPipeline.from_pretrained(out)
    images = torch.stack(pipe(labels=labels, seeds=seeds, output_type='tensor').images)
    torch.testing.assert_close(images, expected, rtol=0, atol=tolerance)
    # a generator draws other seeds each time, and the same ones from the same state
    drawn = [
        pipe(labels=3, generator=torch.Generator().manual_seed(5), output_type='tensor').images[0]
        for _ in range(2)
    ]
    assert torch.equal(*drawn) and not torch.allclose(drawn[0], expected[3])
    # the teacher comes from the config, the generator from the export
    both = FGMInferencer(cfg, out)
    assert both.networks == ['generator_ema', 'teacher']
    own = FGMInferencer(cfg)(labels, seeds, out='tensor', nfe=3)['predictions']
    assert torch.equal(
        torch.stack(both(labels, seeds, out='tensor', network='teacher', nfe=3)['predictions']),
        torch.stack(own),
    )


def test_card_says_what_the_run_measured(digits, tmp_path):
    """At the checkpoint's iteration, of the network that is exported."""
    start = tmp_path / 'run' / '20260101_000000'
    (start / 'vis_data').mkdir(parents=True)
    (start / 'vis_data' / 'config.py').write_text(read_config(digits.config).pretty_text)
    (start / 'vis_data' / 'scalars.json').write_text(
        ''.join(
            json.dumps({'fd/fd': value, 'step': step}) + '\n'
            for step, value in ((2, 0.75), (4, 0.5), (6, 0.25))
        )
    )
    content = torch.load(digits.weights)
    torch.save(
        {**content, 'message_hub': dict(runtime_info=dict(iter=3))}, tmp_path / 'run' / 'iter_4.pth'
    )
    (tmp_path / 'run' / 'last_checkpoint').write_text('iter_4.pth')
    for network, metrics in (('generator_ema', {'fd/fd': 0.5}), ('generator', {})):
        export_generator(
            read_config(digits.config),
            str(tmp_path / 'run'),
            str(tmp_path / network),
            network=network,
        )
        source = json.loads((tmp_path / network / 'mmfgm_export.json').read_text())['source']
        assert (source['checkpoint'], source['iterations'], source['metrics']) == (
            'iter_4.pth',
            4,
            metrics,
        )
        assert ('| fd/fd | 0.5 |' in (tmp_path / network / 'README.md').read_text()) == bool(
            metrics
        )


def test_unconditional_unet(tmp_path):
    """CIFAR-10's network, made small."""
    (tmp_path / 'run').mkdir()
    unet = dict(
        img_resolution=8,
        model_channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
    )
    problem = make_problem(
        tmp_path / 'run',
        f"""
_base_ = [{str(ROOT / 'configs/fgm/cifar10_uncond.py')!r}]
model = dict(network=dict(unet={unet}), teacher=dict(checkpoint='TEACHER'))
""",
    )
    export_generator(
        read_config(problem.config),
        problem.weights,
        str(tmp_path / 'out'),
        network='generator_ema_9999',
    )
    images = OneStepPipeline.from_pretrained(str(tmp_path / 'out'))(
        num_images=3, seeds=5, output_type='tensor'
    ).images
    batch = dict(idx=torch.arange(3), seed=torch.arange(3) + 5)
    expected = problem.model.sample(batch, Sampling('generator_ema_9999'))
    torch.testing.assert_close(torch.stack(images), expected, rtol=1e-5, atol=1e-5)


def test_words_go_with_their_generator(shapes, tmp_path):
    export_generator(read_config(shapes.config), shapes.weights, str(tmp_path / 'out'))
    prompts = ['a red circle', 'two squares']
    images = OneStepPipeline.from_pretrained(str(tmp_path / 'out'))(
        prompt=prompts, seeds=SEEDS, output_type='tensor'
    ).images
    assert torch.equal(to_unit(images), images_of(shapes.config, shapes.weights, prompts))


LORA = (
    "\nmodel['lora'] = dict(rank=4, alpha=8, target_modules=('attn.to_q', 'attn.to_out.0',"
    " 'ff.net.2', 'proj_out'))\n"
)


def lora_problem(folder, base, config=None, **generator):
    folder.mkdir()
    problem = make_problem(folder, (config or sd3_config(base, **generator)) + LORA)
    adapters = {name: p for name, p in problem.model.named_parameters() if 'lora_' in name}
    for name, p in adapters.items():
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    torch.save(dict(state_dict=adapters), problem.weights)
    return problem


def test_lora_is_merged_and_folded(sd3_folder, tmp_path):
    problem, out = (
        lora_problem(tmp_path / 'run', sd3_folder, t_star=0.97, c_in=0.8),
        str(tmp_path / 'out'),
    )
    ours = images_of(problem.config, problem.weights)
    assert not torch.allclose(
        ours, images_of(problem.config, problem.weights, network='teacher', nfe=1), atol=0.01
    )
    export_generator(read_config(problem.config), problem.weights, out)
    torch.testing.assert_close(stock(out), ours, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match=r'adapters alone cannot hold .* t_star=0.97, c_in=0.8'):
        export_generator(
            read_config(problem.config), problem.weights, str(tmp_path / 'lora'), lora=True
        )
    assert not (tmp_path / 'lora').exists()


def test_sd35_is_folded_and_takes_adapters(tmp_path):
    base = make_tiny_sd3(tmp_path / 'base', **SD35)
    problem = lora_problem(tmp_path / 'run', base, t_star=0.97, c_in=0.8)
    ours, out = images_of(problem.config, problem.weights), str(tmp_path / 'out')
    export_generator(read_config(problem.config), problem.weights, out)
    torch.testing.assert_close(stock(out), ours, rtol=0, atol=1e-5)
    assert not torch.allclose(stock(base), ours, atol=0.01)


def test_lora_in_bf16_after_its_teacher(sd3_folder, tmp_path):
    """The adapters' copy of a teacher that is loaded already does not compute as the teacher."""
    problem = lora_problem(tmp_path / 'run', sd3_folder, t_star=0.97, c_in=0.8)
    cfg, images = read_config(problem.config), []
    encoded = FGMInferencer(problem.config, problem.weights).text_encoder.encode(PROMPTS)
    batch = dict(idx=torch.arange(2), seed=torch.tensor(SEEDS), cond=encoded)
    for order in (['generator_ema'], ['teacher', 'generator_ema']):
        with DefaultScope.overwrite_default_scope('mmfgm'):
            model = SamplingModel(
                cfg.model, problem.weights, precision='bf16', null=lambda cond: cond
            )
            for name in order:
                model.load(name)
        images.append(model.sample(batch, Sampling('generator_ema')))
    assert torch.equal(*images)


def test_lora_file(sd3_folder, tmp_path):
    problem, out = (
        lora_problem(tmp_path / 'run', sd3_folder, t_star=1.0, c_in=1.0, c_out=1.0),
        str(tmp_path / 'out'),
    )
    assert export_generator(read_config(problem.config), problem.weights, out, lora=True) == 'lora'
    ours = images_of(problem.config, problem.weights)
    torch.testing.assert_close(stock(sd3_folder, lora=out), ours, rtol=0, atol=1e-5)
    assert not torch.allclose(stock(sd3_folder), ours, atol=0.01)
    with pytest.raises(UsageError, match="holds adapters alone, for diffusers' load_lora_weights"):
        FGMInferencer(out)


@pytest.mark.parametrize('lora', [False, True])
def test_licence_of_a_base_on_the_hub(tmp_path, monkeypatch, lora):
    """Which the pipeline's own download leaves there."""
    base, load_config = make_tiny_sd3(tmp_path / 'snapshot'), DiffusionPipeline.load_config
    problem = lora_problem(tmp_path / 'run', base, t_star=1.0, c_in=1.0, c_out=1.0)

    def snapshot_download(name, allow_patterns):
        assert name == 'someone/tiny-sd3' and allow_patterns == ['README.md', 'LICENSE*']
        (tmp_path / 'snapshot' / 'README.md').write_text(
            '---\nlicense: other\nlicense_link: LICENSE.md\n---\n'
        )
        (tmp_path / 'snapshot' / 'LICENSE.md').write_text('for cats')

    monkeypatch.setattr(DiffusionPipeline, 'load_config', lambda name: load_config(base))
    monkeypatch.setattr(StableDiffusion3Pipeline, 'download', lambda name: base)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    out = tmp_path / 'out'
    export_generator(
        read_config(problem.config), problem.weights, str(out), 'someone/tiny-sd3', lora=lora
    )
    head, card = (out / 'README.md').read_text().split('---\n')[1:]
    assert '\nbase_model: someone/tiny-sd3\nlicense: other\nlicense_link: LICENSE.md\n' in head
    assert '| other, LICENSE.md |' in card and (out / 'LICENSE.md').read_text() == 'for cats'
