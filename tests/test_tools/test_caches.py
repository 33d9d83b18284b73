# Copyright (c) mmfgm authors.
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from mmfgm.caches import ShardWriter, identify, identity_of, read_prompts
from mmfgm.datasets import CachedPrompts, verify_cache
from mmfgm.errors import UsageError
from mmfgm.models.families import find
from mmfgm.tools.cache_prompts import cache_prompts
from tests.conftest import LIMIT, ROOT, run_module, tool_env
from tests.tiny_sd3 import WORDS, make_tiny_sd3

PROMPTS = [
    'a red cat',
    'the large green house in a tree',
    'Dog!',
    'a small photo of a bird with a blue house on it',
    'the tree',
]
SMALL = ('--batch-size', '2', '--shard-size', '2', '--max-length', '32')


@pytest.fixture(scope='module')
def sd3(tmp_path_factory):
    return make_tiny_sd3(tmp_path_factory.mktemp('sd3'))


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS) + '\n')
    return str(tmp_path / 'prompts.txt')


def encode(model, prompts, dtype=torch.float32, max_length=32):
    """What diffusers' pipeline makes of the prompts, two at a time as in ``SMALL``."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        model, transformer=None, vae=None, torch_dtype=dtype
    )
    with torch.no_grad():
        parts = [
            pipeline.encode_prompt(
                prompts[i : i + 2],
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=max_length,
            )
            for i in range(0, len(prompts), 2)
        ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts]), pipeline


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_prompts_are_what_the_pipeline_encodes(sd3, prompts, tmp_path, dtype):
    cache_prompts([prompts, str(tmp_path / 'out'), '--model', sd3, '--dtype', dtype, *SMALL])
    cache = CachedPrompts(str(tmp_path / 'out'), verify=True)
    torch_dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    embeds, pooled, pipeline = encode(sd3, PROMPTS, torch_dtype)
    batch = cache.__getitems__(range(len(PROMPTS)))
    assert batch['cond']['prompt_embeds'].dtype == torch_dtype and torch.equal(
        batch['cond']['prompt_embeds'], embeds
    )
    assert torch.equal(batch['cond']['pooled_embeds'], pooled)
    embeds, pooled, _ = encode(sd3, [''], torch_dtype)
    assert torch.equal(cache.null['prompt_embeds'], embeds[0]) and torch.equal(
        cache.null['pooled_embeds'], pooled[0]
    )
    # the same encoders, whatever dtype they are in
    for encoders in (pipeline, encode(sd3, [''])[2]):
        for part, identity in cache.manifest['identity'].items():
            assert identify(getattr(encoders, part)) == identity


def test_dropped_padding_is_zero_and_saves_space(sd3, prompts, tmp_path):
    sizes = {}
    embeds, pooled, pipeline = encode(sd3, PROMPTS)
    clip, t5 = (
        [len(ids) for ids in tokenizer(PROMPTS).input_ids]
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_3)
    )
    for drop in ('none', 't5', 'all'):
        out = tmp_path / drop
        cache_prompts(
            [prompts, str(out), '--model', sd3, '--dtype', 'fp32', '--drop-padding', drop, *SMALL]
        )
        expected = embeds.clone()
        for i in range(len(PROMPTS)):
            if drop != 'none':
                expected[i, 77 + t5[i] :] = 0
            if drop == 'all':
                expected[i, clip[i] : 77] = 0
        batch = CachedPrompts(str(out)).__getitems__(range(len(PROMPTS)))
        assert torch.equal(batch['cond']['prompt_embeds'], expected) and torch.equal(
            batch['cond']['pooled_embeds'], pooled
        )
        sizes[drop] = sum(file.stat().st_size for file in out.glob('shard*'))
    assert sizes['none'] - sizes['t5'] > 4 * 32 * (32 * len(t5) - sum(t5)) * 0.9
    assert sizes['t5'] - sizes['all'] > 4 * 24 * (77 * len(clip) - sum(clip)) * 0.9


def test_without_t5_its_tokens_are_zero(sd3, prompts, tmp_path):
    cache_prompts(
        [prompts, str(tmp_path / 'out'), '--model', sd3, '--dtype', 'fp32', '--without-t5', *SMALL]
    )
    batch = CachedPrompts(str(tmp_path / 'out')).__getitems__([0, 1, 4])
    embeds, _, _ = encode(sd3, PROMPTS)
    assert torch.equal(batch['cond']['prompt_embeds'][:, :77], embeds[[0, 1, 4], :77])
    assert (
        batch['cond']['prompt_embeds'].shape == (3, 77 + 32, 32)
        and not batch['cond']['prompt_embeds'][:, 77:].any()
    )


@pytest.mark.slow
def test_killed_and_restarted_is_the_same(sd3, tmp_path):
    rng = np.random.default_rng(0)
    lines = [' '.join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(600)]
    (tmp_path / 'p.txt').write_text('\n'.join(lines))
    args = (
        '--model',
        sd3,
        '--batch-size',
        4,
        '--shard-size',
        8,
        '--max-length',
        64,
        '--drop-padding',
    )
    out, whole, twice = tmp_path / 'out', tmp_path / 'whole', tmp_path / 'twice'
    command = [
        sys.executable,
        '-m',
        'mmfgm.tools.cache_prompts',
        str(tmp_path / 'p.txt'),
        str(out),
        *map(str, args),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=tool_env(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + LIMIT
    while len(list(out.glob('shard_*.safetensors'))) < 5 and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / 'manifest.json').exists()
    before = {
        path: path.stat().st_mtime_ns
        for path in out.glob('shard_*.safetensors')
        if path.with_name(f'{path.name}.json').exists()
    }
    assert 4 <= len(before) < 75
    with pytest.raises(UsageError, match='not a finished cache.*goes on where it stopped'):
        CachedPrompts(str(out))
    (out / f'{ShardWriter.name(70)}.123.tmp').write_bytes(b'half a shard')
    run_module('mmfgm.tools.cache_prompts', tmp_path / 'p.txt', out, *args)
    assert before == {
        path: path.stat().st_mtime_ns for path in before
    }  # what was finished was not made again
    run_module('mmfgm.tools.cache_prompts', tmp_path / 'p.txt', whole, *args)
    run_module(
        'mmfgm.tools.cache_prompts',
        tmp_path / 'p.txt',
        twice,
        *args,
        '--launcher',
        'pytorch',
        nproc=2,
    )
    assert content(out) == content(whole) == content(twice)
    assert set(content(out)) == {
        'manifest.json',
        'null.safetensors',
        *map(ShardWriter.name, range(75)),
    }


def test_corrupted_shard_is_named_and_made_again(sd3, prompts, tmp_path, capsys):
    out = tmp_path / 'out'
    cache_prompts([prompts, str(out), '--model', sd3, *SMALL])
    good, shard = content(out), out / 'shard_000001.safetensors'
    changed = bytearray(shard.read_bytes())
    changed[-5] ^= 1
    shard.write_bytes(changed)
    CachedPrompts(str(out))  # its size and header are right
    for check in (lambda: verify_cache(str(out)), lambda: CachedPrompts(str(out), verify=True)):
        with pytest.raises(
            UsageError, match='1 of 4 files.*corrupted.*: shard_000001.safetensors; delete'
        ):
            check()
    shard.write_bytes(changed[:-1])
    with pytest.raises(UsageError, match="shard_000001.safetensors' is missing or corrupted"):
        CachedPrompts(str(out))
    shard.write_bytes(b'\0' * len(changed))
    with pytest.raises(UsageError, match="shard_000001.safetensors' is missing or corrupted"):
        CachedPrompts(str(out))
    shard.unlink()
    cache_prompts([prompts, str(out), '--model', sd3, *SMALL])
    assert content(out) == good and '2 of 2 prompts' in capsys.readouterr().out


def test_other_encoders_prompts_or_settings_are_refused(sd3, prompts, tmp_path):
    out = str(tmp_path / 'out')
    cache_prompts([prompts, out, '--model', sd3, *SMALL])
    other = make_tiny_sd3(tmp_path / 'other', seed=1)
    identity = CachedPrompts(out).manifest['identity']
    assert CachedPrompts(out, identity=identity)[4]['idx'] == 4
    encoder = find(other).encoder(other, dtype='bfloat16', max_length=32)
    with pytest.raises(
        UsageError, match=r'a cache of other encoders: text_encoder\.weights is \w{8}, expected'
    ):
        CachedPrompts(out, identity=identity_of(encoder))
    with pytest.raises(UsageError, match='other encoders: text_encoder_3'):
        CachedPrompts(
            out,
            identity={name: value for name, value in identity.items() if name != 'text_encoder_3'},
        )
    for model, more, differs in (
        (other, (), 'identity.text_encoder.weights'),
        (sd3, ('--dtype', 'fp32'), 'settings.dtype'),
    ):
        with pytest.raises(UsageError, match=f'begun with something else: .*{differs} is'):
            cache_prompts([prompts, out, '--model', model, *SMALL, *more])
    with open(prompts, 'a') as f:
        f.write('another\n')
    with pytest.raises(
        UsageError, match='begun with something else: source.count is 5, expected 6'
    ):
        cache_prompts([prompts, out, '--model', sd3, *SMALL])


def test_bad_prompts_are_named_or_skipped(sd3, tmp_path):
    lines = [PROMPTS[0], '', 'red ' * 32, 'red ' * 31, '   ', PROMPTS[1]]
    (tmp_path / 'p.txt').write_text('\n'.join(lines))
    args = [str(tmp_path / 'p.txt'), str(tmp_path / 'out'), '--model', sd3, *SMALL]
    with pytest.raises(
        UsageError,
        match='3 of 6.*line 2 is empty; line 3 has 33 T5 tokens, more than 32; line 5 is empty;',
    ):
        cache_prompts(args)
    assert not (tmp_path / 'out').exists()
    cache_prompts([*args, '--on-bad', 'skip'])
    cache = CachedPrompts(str(tmp_path / 'out'))
    expected = encode(sd3, [lines[0], lines[3], lines[5]], torch.bfloat16)[0]
    assert len(cache) == 3 and torch.equal(
        cache.__getitems__([0, 1, 2])['cond']['prompt_embeds'], expected
    )
    assert [line for line, _ in cache.manifest['source']['skipped']] == [
        'line 2',
        'line 3',
        'line 5',
    ]
    with pytest.raises(UsageError, match='line 3 has 98 CLIP tokens, more than 77'):
        cache_prompts([*args, '--without-t5'])


def test_prompt_files(tmp_path, monkeypatch):
    (tmp_path / 'a.jsonl').write_text('{"prompt": "a, b", "x": 1}\n{"prompt": null}\n')
    (tmp_path / 'a.csv').write_text('x,prompt\n1,"a, b"\n2,\n')
    assert read_prompts(str(tmp_path / 'a.jsonl'), 'prompt') == (
        ['line 1', 'line 2'],
        ['a, b', None],
    )
    assert read_prompts(str(tmp_path / 'a.csv'), 'prompt') == (['line 2', 'line 3'], ['a, b', ''])
    (tmp_path / 'b.jsonl').write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    for name, column, match in (
        ('a.jsonl', 'text', "line 1: expected an object with 'text'"),
        ('b.jsonl', 'prompt', 'line 2: '),
        ('a.csv', 'text', "no column 'text', but .*prompt"),
        ('empty.txt', '', 'no prompts'),
        ('latin.txt', '', 'not UTF-8'),
        ('none.txt', '', 'cannot be read'),
        ('a.doc', '', 'none of them'),
        ('a.parquet', '', 'needs pyarrow.*pip install'),
    ):
        with pytest.raises(UsageError, match=match):
            read_prompts(str(tmp_path / name), column)


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(text=['a', None, 'b'])), tmp_path / 'a.parquet')
    assert read_prompts(str(tmp_path / 'a.parquet'), 'text') == (
        ['row 0', 'row 1', 'row 2'],
        ['a', None, 'b'],
    )
    with pytest.raises(UsageError, match="no column 'prompt'"):
        read_prompts(str(tmp_path / 'a.parquet'), 'prompt')


def test_models_that_are_not_sd3(sd3, prompts, tmp_path, monkeypatch):
    def refused(model, match, *more):
        with pytest.raises(UsageError, match=match):
            cache_prompts([prompts, str(tmp_path / 'out'), '--model', str(model), *SMALL, *more])

    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', 'not a whole .*Stable Diffusion 3.* folder.*download all')
    refused(tmp_path / 'nowhere', 'there is no folder')
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'model_index.json').write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    refused(other, 'is a StableDiffusionXLPipeline, expected .*a StableDiffusion3Pipeline')
    part = make_tiny_sd3(tmp_path / 'part')
    os.remove(f'{part}/text_encoder_2/model.safetensors')
    refused(part, 'not a whole .*Stable Diffusion 3.* folder.*download all')
    index = json.loads((tmp_path / 'part/model_index.json').read_text())
    (tmp_path / 'part/model_index.json').write_text(
        json.dumps({**index, 'text_encoder_3': [None, None]})
    )
    refused(part, 'has no text_encoder_3; .*--without-t5')

    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    for error, match in (
        (
            GatedRepoError,
            'is gated.*accept its license at https://huggingface.co/some/model, log in',
        ),
        (LocalEntryNotFoundError, 'cannot be had from the hub.*hf download some/model'),
    ):

        def fail(*args, error=error, **kwargs):
            raise OSError('We could not load it') from error.__new__(error)

        monkeypatch.setattr(DiffusionPipeline, 'load_config', fail)
        refused('some/model', match)
    monkeypatch.undo()
    refused(
        sd3, '--max-length must be at least 1 and at most 512, but is 513', '--max-length', '513'
    )


@pytest.mark.slow
def test_tools_end_with_a_message(sd3, prompts, tmp_path):
    result = run_module('mmfgm.tools.cache_prompts', prompts, tmp_path, '--model', sd3, codes=(2,))
    assert 'is neither empty nor a cache' in result.stderr and 'Traceback' not in result.stderr
