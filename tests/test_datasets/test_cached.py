# Copyright (c) mmfgm authors.
import json
import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from mmfgm.caches import ShardWriter
from mmfgm.datasets import CachedLatents, CachedPrompts, cached, collate
from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS
from tests.batches import concatenate, rows, same

COUNTS = (3, 0, 4, 1)  # of the shards: one lost all its items
RNG = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=RNG).bfloat16()


def ragged(values, tokens):
    return torch.cat([value[:number] for value, number in zip(values, tokens)])


def make(folder, kind='latents'):
    """A cache written by hand and the items it holds: no CLIP padding dropped, T5's dropped, one
    prompt without tokens."""
    n = sum(COUNTS)
    clip, t5, pooled, x_0 = randn(n, 7, 4), randn(n, 5, 6), randn(n, 3), randn(n, 2, 4, 4)
    tokens = torch.tensor([5, 1, 0, 2, 3, 4, 1, 5])
    layout = dict(
        clip=[7, 4], t5=[5, 6], pooled=[3], **(dict(x_0=[2, 4, 4]) if kind == 'latents' else {})
    )
    settings = dict(dtype='bfloat16', resolution=32)
    job = dict(kind=kind, identity=dict(vae=dict(weights='1')), settings=settings, layout=layout)
    writer = ShardWriter(str(folder), job)
    writer.begin()
    start = 0
    for number, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        tensors = (
            dict(
                clip=clip[rows],
                t5=ragged(t5[rows], tokens[rows]),
                t5_tokens=tokens[rows],
                pooled=pooled[rows],
                x_0=x_0[rows],
            )
            if count
            else {}
        )
        writer.write(writer.name(number), tensors, count)
        start += count
    writer.write(
        'null.safetensors',
        dict(clip=clip[:1], t5=t5[0, :2], t5_tokens=torch.tensor([2]), pooled=pooled[:1]),
        1,
    )
    writer.finish([writer.name(number) for number in range(len(COUNTS))])
    t5[torch.arange(5) >= tokens[:, None]] = 0
    embeds = torch.zeros(n, 12, 6).bfloat16()
    embeds[:, :7, :4], embeds[:, 7:] = clip, t5
    cond = dict(prompt_embeds=embeds, pooled_embeds=pooled)
    return dict(idx=torch.arange(n), x_0=x_0, cond=cond)


def test_items_come_back_across_shards(tmp_path):
    items = make(tmp_path / 'cache')
    cache = DATASETS.build(dict(type='CachedLatents', path=str(tmp_path / 'cache'), verify=True))
    order = [7, 0, 3, 2, 6, 3]
    assert same(cache.__getitems__(order), rows(items, order))
    assert same(cache[5], rows(items, 5))
    assert len(cache) == 8 and cache.event_shape == (2, 4, 4)
    cond = items['cond']
    null = cond['prompt_embeds'][0].clone()
    null[7 + 2 :] = 0
    assert same(cache.null, dict(prompt_embeds=null, pooled_embeds=cond['pooled_embeds'][0]))
    assert CachedLatents(str(tmp_path / 'cache'), prompts=False)[0]['cond'] == {}
    for index in (8, -1):
        with pytest.raises(IndexError, match=f'index {index} of a cache of 8 items'):
            cache[index]


@pytest.mark.parametrize('data, longest', [([1, 2, 3], 2), ([1, 2], 2), ([4, 2], 3), ([0, 1], 5)])
def test_padding_can_be_dropped_up_to_the_longest_prompt(tmp_path, data, longest):
    """That of the empty prompt, of two tokens, included: it is put beside the others."""
    items = make(tmp_path / 'cache')
    cache = CachedLatents(str(tmp_path / 'cache'), drop_padding=True)
    found = cache.__getitems__(data)
    expected = items['cond']['prompt_embeds'][data]
    assert torch.equal(found['cond']['prompt_embeds'], expected[:, : 7 + longest])
    assert not expected[:, 7 + longest :].any()
    assert torch.equal(found['cond']['pooled_embeds'], items['cond']['pooled_embeds'][data])
    assert torch.equal(found['x_0'], items['x_0'][data].float())
    assert cache.null['prompt_embeds'].shape == (7 + 2, 6)
    # what it is expanded to, by guidance, cuts nothing off
    whole = CachedLatents(str(tmp_path / 'cache')).null['prompt_embeds']
    assert torch.equal(cache.null['prompt_embeds'], whole[: 7 + 2]) and not whole[7 + 2 :].any()


def test_padding_that_cannot_be_dropped(tmp_path):
    make(tmp_path / 'cache', 'prompts')
    manifest = json.loads((tmp_path / 'cache' / 'manifest.json').read_text())
    del manifest['checksum']
    masked = {**manifest, 'conditions': dict(prompt_embeds=['t5'], prompt_mask=['clip'])}
    (tmp_path / 'cache' / 'manifest.json').write_text(json.dumps(masked))
    with pytest.raises(UsageError, match='leaves padding out by itself; remove drop_padding'):
        CachedPrompts(str(tmp_path / 'cache'), drop_padding=True)
    (tmp_path / 'cache' / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match='with it; make it again with .* --drop-padding'):
        first = CachedPrompts(str(tmp_path / 'cache'))
        first._shard(first.shards[0]['file']).offsets.clear()
        first._check_padding()


def test_workers_give_the_same_items(tmp_path, monkeypatch):
    items = make(tmp_path / 'cache', 'prompts')
    monkeypatch.setattr(cached, 'OPEN_SHARDS', 1)  # each other shard closes the one before
    cache = CachedPrompts(str(tmp_path / 'cache'))
    cache[0]  # opened before the workers are forked
    del items['x_0']
    loader = DataLoader(cache, batch_size=3, num_workers=2, collate_fn=collate)
    batches = list(loader)
    assert same(concatenate(batches), items)
    assert same(cache.__getitems__(range(8)), items) and len(cache._opened[os.getpid()]) == 1
    copy = pickle.loads(pickle.dumps(cache))
    assert not copy._opened and same(copy[4], cache[4])


def test_bad_folders(tmp_path):
    with pytest.raises(
        UsageError, match='manifest.json is missing; make one with tools/cache_prompts.py'
    ):
        CachedPrompts(str(tmp_path))
    make(tmp_path / 'cache')
    (tmp_path / 'cache/shard_000002.safetensors').unlink()
    with pytest.raises(
        UsageError, match="shard_000002.safetensors' is missing or corrupted: it has None bytes"
    ):
        CachedLatents(str(tmp_path / 'cache'))
    (tmp_path / 'cache/manifest.json').write_text('{"kind": "latents"}')
    with pytest.raises(UsageError, match="manifest.json' is damaged"):
        CachedLatents(str(tmp_path / 'cache'))


def test_only_left_overs_of_caches_are_removed(tmp_path):
    """In a folder that is no cache nothing is touched, and in a cache only our own names go."""
    folder = tmp_path / 'downloads'
    folder.mkdir()
    (folder / 'video.tmp').write_text('half of a download')
    with pytest.raises(UsageError, match='neither empty nor a cache'):
        ShardWriter(str(folder), dict(kind='prompts')).begin()
    assert (folder / 'video.tmp').exists()

    cache = tmp_path / 'cache'
    ShardWriter(str(cache), dict(kind='prompts')).begin()
    ours = f'{ShardWriter.name(3)}.{"0a" * 16}.tmp'
    for name in (ours, 'video.tmp', 'shard_notes.tmp'):
        (cache / name).write_text('x')
    ShardWriter(str(cache), dict(kind='prompts')).begin()
    left = sorted(path.name for path in cache.iterdir())
    assert left == ['job.json', 'shard_notes.tmp', 'video.tmp']
