# Copyright (c) mmfgm authors.
"""CLIPScore, PickScore and FDDINOv2 on tiny random networks, against transformers' own forward and
torchmetrics; PairwiseLPIPS against its formula."""

import json
import re
import sys
from itertools import combinations
from pathlib import Path
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.registry import DefaultScope
from torchmetrics.functional.multimodal import clip_score
from torchvision.models import alexnet
from torchvision.transforms.v2.functional import resize
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

import mmfgm.engine  # noqa: F401
from mmfgm.datasets import GenerationDataset
from mmfgm.errors import UsageError
from mmfgm.evaluation import Evaluation, frechet_distance
from mmfgm.models import Sampling
from mmfgm.registry import DATASETS
from tests.conftest import run_module

WORDS = ['red', 'blue', 'circle', 'square', 'cross', 'a']


def images(indices, offset=0):
    rows = [
        torch.randint(256, (3, 20, 24), generator=torch.Generator().manual_seed(offset + int(i)))
        for i in indices
    ]
    return torch.stack(rows).to(torch.uint8)


def prompt(i):
    # of different lengths, so that padding depends on the batch
    return ' '.join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 4))


@DATASETS.register_module()
class PrefPrompts(GenerationDataset):
    """Items that know their prompts, and real images."""

    def row(self, index):
        return dict(prompt=prompt(index))

    def __getitems__(self, indices):
        return dict(idx=torch.as_tensor(indices), x_0=images(indices, 5000))


class Echo:
    """A model whose samples are exact functions of idx."""

    def sample(self, batch, sampling):
        return images(batch['idx']).float() / 127.5 - 1


def evaluate(batch_size, metrics, num_samples=21, type='PrefPrompts'):
    with DefaultScope.overwrite_default_scope('mmfgm'):
        evaluation = Evaluation(
            name='e',
            sampling=dict(network='generator_ema'),
            batch_size=batch_size,
            metrics=metrics,
            dataset=dict(type=type, num_samples=num_samples),
        )
        return evaluation.run(Echo(), Sampling('generator_ema'))


def all_metrics(clip, dino, alexnet):
    return dict(
        lpips=dict(type='PairwiseLPIPS', size=48, alexnet=alexnet),
        clip=dict(type='CLIPScore', pretrained=clip),
        pick=dict(type='PickScore', pretrained=clip),
        fd=dict(
            type='FDDINOv2',
            reference=dict(type='PrefPrompts', num_samples=30),
            feature=dict(type='DINOv2', pretrained=dino),
        ),
    )


def main():
    """Run by every process of a torchrun; prints the metrics of this world size."""
    dist.init_process_group('gloo')
    out = evaluate(4, all_metrics(*sys.argv[1:]))
    if dist.get_rank() == 0:
        print('RESULT', json.dumps(out))
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Tiny random networks in transformers' format: a CLIP and a DINOv2."""
    root = tmp_path_factory.mktemp('judges')
    words = ['<|startoftext|>', '<|endoftext|>', *(f'{word}</w>' for word in WORDS)]
    # whole words by merges of their letters
    vocab, merges = list(words), []
    for word in WORDS:
        parts = [*word[:-1], f'{word[-1]}</w>']
        vocab += parts
        while len(parts) > 1:
            merges.append(f'{parts[0]} {parts[1]}')
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.append(parts[0])
    vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    (root / 'vocab.json').write_text(json.dumps(vocab))
    (root / 'merges.txt').write_text('\n'.join(['#version: 0.2', *dict.fromkeys(merges)]))
    tokenizer = CLIPTokenizer.from_pretrained(root)
    torch.manual_seed(0)
    tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    network = CLIPModel(
        CLIPConfig(
            text_config=dict(tiny, vocab_size=len(vocab), max_position_embeddings=16, **special),
            vision_config=dict(tiny, image_size=16, patch_size=8),
            projection_dim=8,
            logit_scale_init_value=3.0,
        )
    )
    for value in network.parameters():
        # random networks of transformers' small start give all images one feature
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.5)
    # with these random weights images and prompts would be opposed, and a score below 0 is cut off
    network.text_projection.weight.data.neg_()
    sizes = dict(size=dict(shortest_edge=16), crop_size=dict(height=16, width=16))
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(root / 'clip')
    network.save_pretrained(root / 'clip')
    network = Dinov2Model(Dinov2Config(**tiny, image_size=16, patch_size=8))
    for value in network.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.5)
    network.save_pretrained(root / 'dino')
    BitImageProcessor(**sizes).save_pretrained(root / 'dino')
    # the convolutions alone; the classifier has 58 million weights
    torch.save(
        {f'features.{key}': value for key, value in alexnet().features.state_dict().items()},
        root / 'alexnet.pth',
    )
    return str(root / 'clip'), str(root / 'dino'), str(root / 'alexnet.pth')


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


@torch.no_grad()
def test_values_are_those_of_transformers_one_image_at_a_time(folders):
    clip, dino, trunk = folders
    out = evaluate(8, all_metrics(clip, dino, trunk))
    network, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    logits = []
    for i in range(21):
        inputs = processor(text=prompt(i), images=list(images([i])), return_tensors='pt')
        logits.append(float(network(**inputs).logits_per_image))
    assert np.std(logits) > 0.1
    scale = float(network.logit_scale.exp())
    assert out['e/pick'] == pytest.approx(np.mean(logits), rel=1e-5, abs=1e-5)
    expected = 100 * np.mean(logits) / scale
    assert expected > 0.1  # below 0 it would be cut to 0, which holds nothing
    assert out['e/clip'] == pytest.approx(expected, rel=1e-5, abs=1e-5)

    network = Dinov2Model.from_pretrained(dino)
    processor = BitImageProcessor.from_pretrained(dino)
    x, y = (
        np.stack(
            [
                network(**processor(images=list(images([i], offset)), return_tensors='pt'))
                .last_hidden_state[0, 0]
                .double()
                .numpy()
                for i in range(n)
            ]
        )
        for n, offset in ((21, 0), (30, 5000))
    )
    expected = frechet_distance(
        x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    )
    assert out['e/fd'] == pytest.approx(expected, rel=1e-5)


class EarlierCLIP(CLIPModel):
    """Hands out features as transformers 4 did, which torchmetrics was written for."""

    def get_image_features(self, *args, **kwargs):
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs):
        return super().get_text_features(*args, **kwargs).pooler_output


@torch.no_grad()
def test_clip_score_is_that_of_torchmetrics(folders):
    clip = folders[0]
    parts = EarlierCLIP.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    theirs = clip_score(list(images(range(21))), [prompt(i) for i in range(21)], lambda: parts)
    out = evaluate(8, dict(clip=dict(type='CLIPScore', pretrained=clip)))
    assert theirs > 0.1 and out['e/clip'] == pytest.approx(float(theirs), rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_pairwise_lpips_is_its_formula(folders):
    """Zhang et al., Eq. 1: channels of unit length, squared differences, calibrated weights, mean
    over places, summed over layers."""
    out = evaluate(8, dict(m=all_metrics(*folders)['lpips']), num_samples=30)
    network = alexnet().features
    network.load_state_dict(
        {key.removeprefix('features.'): value for key, value in torch.load(folders[2]).items()}
    )
    calibrated = torch.load(
        Path(lpips.__file__).parent / 'weights/v0.1/alex.pth', map_location='cpu'
    )
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(i):
        small = resize(images([i]), [48, 48], antialias=True)[0] / 127.5 - 1
        x = ((small - mean[:, None, None]) / std[:, None, None])[None]
        found = []
        for k, layer in enumerate(network[:12]):
            x = layer(x)
            if k in (1, 4, 7, 9, 11):
                found.append(x / x.norm(dim=1, keepdim=True))
        return found

    def distance(i, j):
        layers = enumerate(zip(features(i), features(j)))
        return sum(
            float((calibrated[f'lin{k}.model.1.weight'] * (a - b) ** 2).sum(1).mean())
            for k, (a, b) in layers
        )

    # prompts come again after 12: six of them have three images and three pairs, six have two
    of_prompts = [[distance(i, j) for i, j in combinations(range(k, 30, 12), 2)] for k in range(12)]
    assert {len(pairs) for pairs in of_prompts} == {1, 3}
    expected = np.mean([np.mean(pairs) for pairs in of_prompts])
    assert out['e/m'] == pytest.approx(expected, rel=1e-5)


def test_does_not_depend_on_batches_or_processes(folders):
    one = {size: evaluate(size, all_metrics(*folders)) for size in (5, 21)}
    assert one[5] == pytest.approx(one[21], rel=1e-5)
    # 21 samples on two processes: one sees padding, which must not count
    text = run_module('tests.test_evaluation.test_preference', *folders, nproc=2).stdout
    two = json.loads(re.search('RESULT (.*)', text).group(1))
    assert two == pytest.approx(one[21], rel=1e-5)


def no_network(*args, **kwargs):
    raise URLError('no network')


def test_other_weights_and_prompts_are_refused(folders, offline, tmp_path, monkeypatch):
    clip, dino, trunk = folders
    for metric in ('CLIPScore', 'PickScore'):
        with pytest.raises(UsageError, match=f"{metric} needs a CLIPModel, but .*'dinov2'"):
            evaluate(8, dict(m=dict(type=metric, pretrained=dino)))
        with pytest.raises(UsageError, match=f"{metric} cannot load 'no-one/nothing'"):
            evaluate(8, dict(m=dict(type=metric, pretrained='no-one/nothing')))
    with pytest.raises(UsageError, match="DINOv2 needs a Dinov2Model, but .*'clip'"):
        evaluate(
            8,
            dict(
                m=dict(type='FDDINOv2', reference='x', feature=dict(type='DINOv2', pretrained=clip))
            ),
        )
    with pytest.raises(UsageError, match='expected features.0.weight of shape .*found nothing'):
        torch.save({}, tmp_path / 'empty.pth')
        evaluate(8, dict(m=dict(type='PairwiseLPIPS', alexnet=str(tmp_path / 'empty.pth'))))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.urlopen', no_network)
    with pytest.raises(UsageError, match='name a file of them by alexnet, which is to be had at'):
        evaluate(8, dict(m=dict(type='PairwiseLPIPS')))
    single = dict(type='PairwiseLPIPS', alexnet=trunk)
    with pytest.raises(UsageError, match='no prompt has two; raise samples_per_prompt'):
        evaluate(8, dict(m=single), num_samples=12)
    score = dict(type='CLIPScore', pretrained=clip)
    with pytest.raises(UsageError, match='needs a dataset that knows its prompts'):
        evaluate(8, dict(m=score), type='GenerationDataset')
    with pytest.raises(UsageError, match='has 9 prompts for 21 samples'):
        evaluate(8, dict(m=dict(score, prompts=dict(type='PrefPrompts', num_samples=9))))


if __name__ == '__main__':
    main()
