# Copyright (c) mmfgm authors.
"""The colour classifier against the rule, spelled again here, on a random CLIP."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval import ClipColors
from mmfgm.evaluation.geneval.colors import cut_out
from mmfgm.registry import TASK_UTILS
from tests.tiny_detector import make_clip, smooth_images

COLORS = ['red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown', 'black', 'white']
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp('clip'))


def scenes(seed=0):
    """Three images of different sizes with boxes and masks of objects in them."""
    rng = np.random.default_rng(seed)
    for index, (height, width) in enumerate([(40, 60), (64, 64), (33, 90)]):
        (image,) = smooth_images((height, width), seed=seed + index)
        masks = rng.random((index + 1, height, width)) < 0.7
        boxes = np.array(
            [[3 + i, 2, width - 7 * i, height - 5 - i, 0.9] for i in range(index + 1)], np.float32
        )
        yield image, boxes, masks


def cut_out_by_pixel(image, box, mask):
    """The reference's ``ImageCrops``: composite with a blank image, then crop."""
    image = Image.fromarray(image)
    blank = Image.new('RGB', image.size, color='#999')
    return Image.composite(image, blank, Image.fromarray(mask)).crop(
        tuple(map(int, map(round, box[:4].tolist())))
    )


def test_objects_are_cut_out_as_in_the_reference(clip):
    transform = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            ToTensor(),
            Normalize(MEAN, STD),
        ]
    )
    colors = ClipColors(*clip)
    for image, boxes, masks in scenes():
        for box, mask in zip(boxes, masks):
            for moved in (box, box + np.float32(0.4), box - np.float32(0.4)):
                ours, theirs = cut_out(image, moved, mask), cut_out_by_pixel(image, moved, mask)
                assert ours.mode == 'RGB' and ours.size == theirs.size
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
                assert torch.equal(colors.transform(ours), transform(theirs))
    image, mask = np.full((4, 4, 3), 7, np.uint8), np.eye(4, dtype=bool)
    expected = [[[7] * 3 if row == column else [153] * 3 for column in (1, 2)] for row in (0, 1, 2)]
    assert np.asarray(cut_out(image, [1, 0, 3, 3, 0.5], mask)).tolist() == expected


def text_vectors(network, tokenizer, name):
    """As the reference's zero-shot classifier does it, colour by colour."""
    vectors = []
    for c in COLORS:
        texts = [
            f'a photo of a {c} {name}',
            f'a photo of a {c}-colored {name}',
            f'a photo of a {c} object',
        ]
        embeddings = network.encode_text(tokenizer(texts))
        mean = (embeddings / embeddings.norm(dim=-1, keepdim=True)).mean(0)
        vectors.append(mean / mean.norm())
    return torch.stack(vectors)


@torch.no_grad()
def test_text_vectors_follow_the_rule_and_are_computed_once(clip):
    import open_clip

    colors = ClipColors(*clip)
    assert not colors.network.training
    asked, encode = [], colors.network.encode_text
    colors.network.encode_text = lambda tokens: asked.append(tokens) or encode(tokens)
    tokenizer = open_clip.get_tokenizer(clip[0])
    for name in ('orange', 'hot dog', 'orange'):
        torch.testing.assert_close(
            colors.text_vectors(name), text_vectors(colors.network, tokenizer, name)
        )
    # two by us, ten for each check; "an" is never written, nor is a class left out that has the
    # colour's name
    assert [len(tokens) for tokens in asked].count(30) == 2
    assert torch.equal(
        asked[0][3:6],
        tokenizer(
            [
                'a photo of a orange orange',
                'a photo of a orange-colored orange',
                'a photo of a orange object',
            ]
        ),
    )


@torch.no_grad()
def test_colors_of_all_requests_at_once(clip):
    """Over batches that cut through requests, and with classes mixed, against object by object."""
    names = ['bench', 'tv remote', 'bench']
    requests = [(*scene, name) for scene, name in zip(scenes(), names)]
    requests.insert(
        1, (requests[0][0], np.zeros((0, 5), np.float32), np.zeros((0, 40, 60), bool), 'car')
    )
    colors = TASK_UTILS.build(
        dict(type='ClipColors', model=clip[0], pretrained=clip[1], batch_size=4)
    )
    # random features differ little between images: move the class vectors to where the images are
    features = torch.cat(
        [
            colors.network.encode_image(colors.transform(cut_out(image, box, mask))[None])
            for image, boxes, masks, _ in requests
            for box, mask in zip(boxes, masks)
        ]
    )
    features = features / features.norm(dim=-1, keepdim=True)
    for name in names:
        colors._text[name] = torch.randn(
            10, 16, generator=torch.Generator().manual_seed(len(name))
        ) @ (
            torch.eye(16)
            - torch.outer(features.mean(0), features.mean(0)) / features.mean(0).square().sum()
        )
    expected = iter(
        (100 * feature @ colors._text[name].T).argmax()
        for feature, name in zip(features, [names[i] for i in (0, 1, 1, 2, 2, 2)])
    )
    expected = [[COLORS[next(expected)] for _ in boxes] for _, boxes, _, _ in requests]
    found = colors.classify(requests)
    assert found == expected and [len(names) for names in found] == [1, 0, 2, 3]
    assert len({color for names in found for color in names}) > 2
    assert colors.classify([]) == []


def test_equal_colors_give_the_first(clip):
    colors = ClipColors(*clip)
    colors._text['dog'] = torch.zeros(10, 16)
    assert colors.classify([(*next(iter(scenes())), 'dog')]) == [['red']]


def test_bad_input(clip, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="QuickGELU.*use 'ViT-L-14-quickgelu'"):
        ClipColors('ViT-L-14')
    with pytest.raises(UsageError, match='knows no model'):
        ClipColors('ViT-X', clip[1])
    with pytest.raises(UsageError, match="cannot load the weights 'nowhere.pt'"):
        ClipColors(clip[0], 'nowhere.pt')
    torch.save(dict(weight=torch.zeros(1)), tmp_path / 'other.pt')
    with pytest.raises(UsageError, match='(?s)cannot load the weights.*Missing key'):
        ClipColors(clip[0], str(tmp_path / 'other.pt'))
    with pytest.raises(UsageError, match='batch_size'):
        ClipColors(*clip, batch_size=0)
    image, boxes, masks = next(scenes())
    for wrong in (masks[:0], masks[:, :5]):
        with pytest.raises(UsageError, match=r'masks of dog must be \(1, 40, 60\)'):
            ClipColors(*clip).classify([(image, boxes, wrong, 'dog')])
    monkeypatch.setitem(sys.modules, 'open_clip', None)
    with pytest.raises(UsageError, match='pip install "mmfgm.geneval."'):
        ClipColors()
