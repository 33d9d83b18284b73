# Copyright (c) mmfgm authors.
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from mmengine.config import Config
from PIL import Image
from safetensors.torch import load_file

from mmfgm.apis import FGMInferencer
from mmfgm.config import resolve
from mmfgm.datasets import GenerationDataset, WordEncoder
from mmfgm.errors import UsageError
from mmfgm.evaluation import to_uint8
from mmfgm.models import Sampling, read_state_dict
from mmfgm.registry import MODELS, TASK_UTILS
from mmfgm.tools.merge_checkpoint import merge


@pytest.fixture(scope='module')
def inferencer(digits):
    return FGMInferencer(digits.config, digits.weights)


def test_samples_are_those_of_an_evaluation(digits, inferencer):
    batch = GenerationDataset(12, num_classes=10).__getitems__(range(12))
    for network in ('generator_ema', 'generator'):
        expected = digits.model.sample(batch, Sampling(network))
        samples = inferencer(
            batch['cond']['labels'],
            seeds=batch['seed'],
            network=network,
            batch_size=5,
            out='tensor',
        )['predictions']
        torch.testing.assert_close(torch.stack(samples), expected, rtol=1e-5, atol=1e-5)
    sampling = dict(nfe=4, solver='heun')
    expected = digits.model.sample(batch, Sampling('teacher', **sampling))
    samples = inferencer(batch['cond']['labels'], network='teacher', out='tensor', **sampling)[
        'predictions'
    ]
    torch.testing.assert_close(torch.stack(samples), expected, rtol=1e-5, atol=1e-5)


def test_a_seed_gives_its_image_whatever_the_batch(inferencer):
    together = inferencer([3, 1, 4, 1, 5], seeds=[7, 8, 9, 8, 10], batch_size=4, out='tensor')[
        'predictions'
    ]
    for i, (label, seed) in enumerate([(3, 7), (1, 8), (4, 9), (1, 8), (5, 10)]):
        alone = inferencer(label, seeds=seed, out='tensor')['predictions']
        # matrix products of other sizes round differently
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1])
    counted = inferencer([3, 3, 3], seeds=7, out='tensor')['predictions']
    torch.testing.assert_close(counted[0], together[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(counted[0], counted[1])


def test_one_generator_and_no_teacher_unless_asked(digits, monkeypatch):
    built, build = [], MODELS.build
    monkeypatch.setattr(MODELS, 'build', lambda cfg: built.append(cfg['type']) or build(cfg))

    def networks_built():
        return [name for name in built if name == 'AdaLNMLP']

    inferencer = FGMInferencer(digits.config, digits.weights)
    assert list(inferencer.model.networks) == ['generator_ema']
    assert networks_built() == ['AdaLNMLP']
    inferencer(0, network='generator')
    assert list(inferencer.model.networks) == ['generator']
    assert networks_built() == ['AdaLNMLP']
    inferencer(0, network='teacher')
    assert sorted(inferencer.model.networks) == ['generator', 'teacher']
    assert networks_built() == ['AdaLNMLP'] * 2
    assert (
        inferencer.networks == ['generator_ema', 'generator', 'teacher']
        and inferencer.condition == 'labels'
    )
    assert inferencer.default_sampling('teacher') == Sampling(
        'teacher', 50
    )  # as the config's pictures do
    assert inferencer.default_sampling() == Sampling('generator_ema')


def test_checkpoints_of_every_kind(digits, inferencer, tmp_path):
    """A work dir with a sharded checkpoint, and a file of tools/merge_checkpoint.py."""
    expected = torch.stack(inferencer([1, 2], out='tensor')['predictions'])
    state = torch.load(digits.weights)['state_dict']
    dcp.save(dict(state_dict=state), checkpoint_id=tmp_path / 'run' / 'iter_1')
    (tmp_path / 'run' / 'last_checkpoint').write_text('/elsewhere/iter_1')
    merge([digits.weights, str(tmp_path / 'merged.safetensors')])
    for weights in ('run', 'run/iter_1', 'merged.safetensors'):
        other = FGMInferencer(digits.config, str(tmp_path / weights))
        assert torch.equal(torch.stack(other([1, 2], out='tensor')['predictions']), expected)
    assert other.networks == ['generator_ema', 'teacher']


@pytest.mark.parametrize('dtype, bits', [('fp16', 11), ('bf16', 8)])
def test_a_merged_file_of_half_the_size(dtype, bits, digits, tmp_path):
    out = tmp_path / 'half.safetensors'
    merge([digits.weights, str(out), '--dtype', dtype])
    exact = read_state_dict(digits.weights, network='generator_ema')
    for key, value in load_file(out).items():
        assert value.element_size() == 2
        # the nearest number of so many bits, which are fewer near zero
        torch.testing.assert_close(value.float(), exact[key], rtol=2.0**-bits, atol=2.0**-25)
    # and a network of float32 takes it
    FGMInferencer(digits.config, str(out))(3)


def test_bf16(digits, inferencer):
    rounded = FGMInferencer(digits.config, digits.weights, precision='bf16')
    for sampling in (dict(), dict(network='teacher', nfe=3)):
        exact, off = (
            torch.stack(each(range(10), out='tensor', **sampling)['predictions'])
            for each in (inferencer, rounded)
        )
        assert off.dtype == torch.float32 and 0 < (off - exact).abs().mean() < 0.02


def test_threads_take_turns(digits, inferencer):
    """Two users at once, of different networks: each gets what it would alone."""
    options = [
        dict(network=network, out='tensor') for network in ('generator_ema', 'generator')
    ] * 8
    alone = [inferencer([3, 4], **option)['predictions'] for option in options[:2]] * 8
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda option: inferencer([3, 4], **option)['predictions'], options)
        )
    for ours, theirs in zip(alone, together):
        assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_kinds_of_output(inferencer):
    (sample,) = inferencer(2, seeds=3, out='tensor')['predictions']
    (array,) = inferencer(2, seeds=3, out='numpy')['predictions']
    (image,) = inferencer(2, seeds=3)['predictions']
    assert sample.dtype == torch.float32 and sample.shape == (1, 8, 8)
    assert array.dtype == np.uint8 and np.array_equal(
        array, to_uint8(sample).permute(1, 2, 0).numpy()
    )
    assert (
        isinstance(image, Image.Image)
        and image.mode == 'L'
        and np.array_equal(np.asarray(image), array[..., 0])
    )
    result = inferencer([2, 5], seeds=3, grid=2, return_datasamples=True)
    first, second = result['predictions']
    torch.testing.assert_close(first.sample, sample, rtol=1e-5, atol=1e-5)
    assert (first.seed, first.label) == (3, 2)
    assert (second.seed, second.label) == (4, 5) and result['visualization'].shape == (10, 19, 3)


def test_points(toy):
    inferencer = FGMInferencer(Config.fromfile(toy.config), toy.weights)
    assert inferencer.condition == 'nothing'
    points = inferencer(5, out='numpy')['predictions']
    expected = toy.model.sample(
        GenerationDataset(5).__getitems__(range(5)), Sampling('generator_ema')
    )
    np.testing.assert_allclose(np.stack(points), expected.numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match=r"not pictures .* ask for out='numpy'"):
        inferencer(2)
    with pytest.raises(UsageError, match='give the number of samples'):
        inferencer('a cat')


def test_words_of_shapes(shapes):
    inferencer = FGMInferencer(shapes.config, shapes.weights)
    prompts = ['a red circle', 'two squares', 'a cross above a circle']
    cond = WordEncoder(max_words=8).encode(prompts)
    batch = dict(idx=torch.arange(3), seed=torch.arange(3) + 5, cond=cond)
    expected = shapes.model.sample(batch, Sampling('generator_ema'))
    samples = inferencer(prompts, seeds=5, out='tensor')['predictions']
    torch.testing.assert_close(torch.stack(samples), expected, rtol=1e-5, atol=1e-5)
    # the config's own way of sampling the teacher, whose "no prompt" is the empty one
    assert inferencer.default_sampling('teacher') == Sampling('teacher', 50, guidance=2.0)
    expected = shapes.model.sample(batch, Sampling('teacher', 3, guidance=2.0))
    samples = inferencer(prompts, seeds=5, out='tensor', network='teacher', nfe=3, guidance=2.0)[
        'predictions'
    ]
    torch.testing.assert_close(torch.stack(samples), expected, rtol=1e-5, atol=1e-5)
    # its null and its 50 steps stay where only another scale is given
    expected = shapes.model.sample(batch, Sampling('teacher', 50, guidance=3.0))
    samples = inferencer(prompts, seeds=5, out='tensor', network='teacher', guidance=3.0)[
        'predictions'
    ]
    torch.testing.assert_close(torch.stack(samples), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="the word 'dragon' of the prompt"):
        inferencer('a red dragon')


def test_null_is_the_one_of_the_config(shapes):
    class Ones:
        def __call__(self, cond):
            return {name: torch.ones_like(value) for name, value in cond.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASK_UTILS.module_dict, 'Ones', Ones)
        inferencer = FGMInferencer(
            _with(shapes.config, {'model.guidance.null.type': 'Ones'}), shapes.weights
        )
    assert isinstance(inferencer.model.null, Ones)


def test_prompts_are_encoded_once(shapes, monkeypatch):
    inferencer, encoded = FGMInferencer(shapes.config, shapes.weights), []
    encode = WordEncoder.encode
    monkeypatch.setattr(WordEncoder, 'check', lambda self, prompts: None)
    monkeypatch.setattr(
        WordEncoder,
        'encode',
        lambda self, prompts: encoded.append(list(prompts)) or encode(self, prompts),
    )
    prompts = ['a red circle', 'two squares', 'a red circle']
    together = inferencer(prompts, seeds=5, out='tensor')['predictions']
    inferencer(prompts, seeds=9, network='teacher', nfe=2)
    assert encoded == [
        ['a red circle', 'two squares']
    ]  # the config's null is ZeroPrompt, which encodes nothing
    for i, prompt in enumerate(prompts):
        (alone,) = inferencer(prompt, seeds=5 + i, out='tensor')['predictions']
        torch.testing.assert_close(alone, together[i], rtol=1e-5, atol=1e-5)


def test_prompts_of_sd3(sd3, sd3_folder, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    prompts = ['a red cat', 'the blue house on a green tree']
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False
        )
    batch = dict(
        idx=torch.arange(2),
        seed=torch.tensor([4, 9]),
        cond=dict(prompt_embeds=embeds, pooled_embeds=pooled),
    )
    expected = sd3.model.sample(batch, Sampling('generator_ema'))
    inferencer = FGMInferencer(sd3.config, sd3.weights)
    assert inferencer.condition == 'prompts' and expected.shape == (2, 3, 16, 16)
    samples = inferencer(prompts, seeds=[4, 9], out='tensor')['predictions']
    torch.testing.assert_close(torch.stack(samples), expected, rtol=1e-5, atol=1e-5)
    # the teacher of the comparison is diffusers' own pipeline
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=inferencer.model.sampler.noise([4, 9]),
        output_type='pt',
    ).images
    ours = inferencer(
        prompts, seeds=[4, 9], out='tensor', network='teacher', nfe=4, shift=3.0, guidance=4.0
    )['predictions']
    torch.testing.assert_close(
        (torch.stack(ours) / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4
    )
    # what is not given is as the config's pictures are made, and the empty prompt is encoded once
    encoded, encode = [], inferencer.text_encoder.encode
    monkeypatch.setattr(
        inferencer.text_encoder,
        'encode',
        lambda texts: encoded.append(list(texts)) or encode(texts),
    )
    monkeypatch.setattr(inferencer, '_empty', {})
    partly = inferencer(
        prompts, seeds=[4, 9], out='tensor', network='teacher', nfe=4, guidance=4.0
    )['predictions']
    assert torch.equal(torch.stack(partly), torch.stack(ours)) and encoded == [['']]
    with pytest.raises(UsageError, match='prompt 2 of 2 has 257 T5 tokens, more than 256'):
        inferencer(['a red cat', ' '.join(['cat'] * 256)])


@pytest.mark.parametrize(
    'inputs, options, message',
    [
        (10, {}, r'whole numbers in \[0, 9\], not 10'),
        ([0, -1], {}, r'whole numbers in \[0, 9\], not -1'),
        ('a cat', {}, "this model has classes: inputs are whole numbers in .*, not 'a cat'"),
        ([1.5], {}, 'not 1.5'),
        ([], {}, 'there are no inputs'),
        ([1, 2, 3], dict(seeds=[1, 2]), 'there are 2 seeds for 3 inputs'),
        ([1], dict(seeds=[2**32]), r'seeds are whole numbers in \[0, 4294967295\], not 4294967296'),
        ([1], dict(batch_size=0), 'batch_size must be at least 1'),
        ([1], dict(network='critic'), "no network 'critic' here; choose from"),
        ([1], dict(nfe=4), 'its NFE is 1, not 4'),
        ([1], dict(network='teacher', nfe=3, solver='heun'), 'multiple'),
        ([1], dict(network='teacher', nfe=3, guidance=2.0), 'guidance=2.0 of teacher needs'),
        ([1], dict(out='jpeg'), "out must be one of .*, but is 'jpeg'"),
    ],
)
def test_bad_calls(inferencer, inputs, options, message):
    with pytest.raises(UsageError, match=message):
        inferencer(inputs, **options)


def test_bad_models(digits, shapes, tmp_path):
    with pytest.raises(UsageError, match='is of another architecture than OneStepGenerator'):
        FGMInferencer(_with(digits.config, {'model.network.width': 32}), digits.weights)
    with pytest.raises(UsageError, match="'nowhere.pth' does not exist"):
        FGMInferencer(digits.config, 'nowhere.pth')
    with pytest.raises(UsageError, match="no config 'nowhere.py'"):
        FGMInferencer('nowhere.py', digits.weights)
    with pytest.raises(UsageError, match='has no network .*generator_ema'):
        FGMInferencer(digits.config, str(digits.folder / 'teacher.pth'))
    with pytest.raises(UsageError, match="'/nowhere/teacher' does not exist"):
        FGMInferencer(_with(digits.config, {'model.teacher.checkpoint': '/nowhere/teacher'}))
    with pytest.raises(UsageError, match='nothing says how they are encoded: set text_encoder'):
        FGMInferencer(_with(shapes.config, {'text_encoder': None}), shapes.weights)
    with pytest.raises(UsageError, match="model.type is 'Generator'; expected FGM"):
        FGMInferencer(_with(digits.config, {'model.type': 'Generator'}), digits.weights)
    with pytest.raises(UsageError, match='FlowMatching has no network without weights'):
        FGMInferencer('mmfgm::reflow/digits.py')
    with pytest.raises(
        UsageError, match='needs a config and a checkpoint, or the folder of an export'
    ):
        FGMInferencer()
    with pytest.raises(UsageError, match="must be 'fp32', 'bf16' or, .* but is 'fp8'"):
        FGMInferencer(digits.config, digits.weights, precision='fp8')


def _with(config, options):
    cfg = resolve(Config.fromfile(config))
    cfg.merge_from_dict(options)
    return cfg
