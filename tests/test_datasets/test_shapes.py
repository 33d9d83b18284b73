# Copyright (c) mmfgm authors.
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmfgm.datasets import ShapePrompts, Shapes, WordEncoder, ZeroPrompt, collate
from mmfgm.datasets.shapes import (
    COLORS,
    COUNTS,
    PLURALS,
    SHAPES,
    TAGS,
    VOCABULARY,
    Item,
    render,
    sample_scene,
)
from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval.judging.prompts import COLORS as GENEVAL_COLORS
from mmfgm.evaluation.geneval.judging.prompts import check_clauses
from mmfgm.flow import ClassifierFreeGuidance
from mmfgm.registry import DATASETS, TASK_UTILS
from tests.batches import concatenate, rows, same

PINNED_PROMPTS = [
    'a triangle',
    'a cross and a circle',
    'two triangles',
    'a white triangle',
    'a triangle left of a square',
    'a blue cross and a white circle',
]
PINNED_PIXELS = [27889, 40524, 28841, 51378, 62943, 100121]
PINNED_EMBEDS = [-0.14507, 0.451788, -1.886856]
PINNED_POOLED = [1.690319, 0.740369, 0.773169]


def test_items_depend_on_seed_and_idx_alone():
    shapes = Shapes(seed=1)
    whole = shapes.__getitems__(range(60))
    assert whole['x_0'].dtype == torch.uint8 and whole['x_0'].shape == (60, 3, 32, 32)
    assert whole['cond']['prompt_embeds'].shape == (60, 12, 64) and whole['cond'][
        'pooled_embeds'
    ].shape == (60, 64)
    for indices in ([59, 3, 17], [7]):
        part = Shapes(seed=1, length=100).__getitems__(indices)
        assert same(part, rows(whole, indices))
    loaded = list(DataLoader(Shapes(seed=1, length=60), 16, num_workers=2, collate_fn=collate))
    assert same(concatenate(loaded), whole)
    single = collate([shapes[5], shapes[9]])
    assert same(single, rows(whole, [5, 9]))
    other = Shapes(seed=2).__getitems__(range(60))['x_0']
    assert not any(torch.equal(a, b) for a in other for b in whole['x_0'])
    assert len(whole['x_0'].flatten(1).unique(dim=0)) == 60
    # another resolution is the same scene
    coarse = torch.nn.functional.avg_pool2d(
        Shapes(size=64, seed=1).__getitems__(range(60))['x_0'].float(), 2
    )
    assert (coarse - whole['x_0']).abs().max() < 90 and (coarse - whole['x_0']).abs().mean() < 2


def test_items_are_pinned():
    # on every machine and version: a change here makes old checkpoints and results incomparable
    shapes = Shapes()
    assert [shapes.row(i)['prompt'] for i in range(6)] == PINNED_PROMPTS
    batch = shapes.__getitems__(range(6))
    assert batch['x_0'].long().sum((1, 2, 3)).tolist() == PINNED_PIXELS
    assert batch['cond']['prompt_embeds'][0, 0, :3].tolist() == pytest.approx(
        PINNED_EMBEDS, abs=1e-6
    )
    assert batch['cond']['pooled_embeds'][5, :3].tolist() == pytest.approx(PINNED_POOLED, abs=1e-6)


def test_captions_say_what_the_rows_say():
    shapes, seen = Shapes(), set()
    for i in range(1200):
        row, items = shapes.scene(i)
        check_clauses(row)
        seen.add(row['prompt'])
        assert row['tag'] == TAGS[i % 6]
        words, clauses = row['prompt'].split(), row['include']
        names = [clause['class'] for clause in clauses]
        if row['tag'] == 'counting':
            assert words == [COUNTS[clauses[0]['count']], PLURALS[names[0]]]
            assert row['exclude'] == [{'class': names[0], 'count': clauses[0]['count'] + 1}]
        elif row['tag'] == 'position':
            relation, target = clauses[1]['position']
            assert target == 0 and row['prompt'] == f'a {names[1]} {relation} a {names[0]}'
        else:
            assert row['prompt'] == ' and '.join(
                f'a {c["color"]} {c["class"]}' if 'color' in c else f'a {c["class"]}'
                for c in clauses
            )
        assert ('color' in clauses[0]) == (row['tag'] in ('colors', 'color_attr'))
        assert ('exclude' in row) == (row['tag'] == 'counting')
        assert (
            len(set(names))
            == len(names)
            == (2 if row['tag'] in ('two_object', 'position', 'color_attr') else 1)
        )
        # nothing but what was asked for
        assert sorted(item.shape for item in items) == sorted(
            name for c in clauses for name in [c['class']] * c['count']
        )
        if row['tag'] == 'color_attr':
            assert items[0].color != items[1].color
    assert {word for prompt in seen for word in prompt.split()} == set(VOCABULARY) and set(
        COLORS
    ) <= set(GENEVAL_COLORS)
    kinds = {
        tag: len({shapes.row(i)['prompt'] for i in range(k, 1200, 6)}) for k, tag in enumerate(TAGS)
    }
    # all 4, 4 x 3, 4 x 3, 4 x 6, 12 x 4; of color_attr's 12 x 30, most of 200 drawn
    assert [*kinds.values()][:5] == [4, 12, 12, 24, 48] and kinds['color_attr'] > 120


def test_objects_keep_apart():
    for i in range(600):
        items = np.array([item[2:] for item in Shapes().scene(i)[1]])
        x, y, r = items.T
        for axis in (x, y):
            assert (axis - r >= 1 / 32 - 1e-9).all() and (axis + r <= 31 / 32 + 1e-9).all()
        gap = np.maximum(abs(x[:, None] - x), abs(y[:, None] - y)) - r[:, None] - r
        assert (gap[np.triu_indices(len(items), 1)] >= 2 / 32 - 1e-9).all()


@pytest.mark.parametrize(
    'shape, area', [('circle', np.pi / 4), ('square', 1), ('triangle', 0.5), ('cross', 5 / 9)]
)
def test_shapes_have_their_area(shape, area):
    for size, tolerance in ((32, 0.05), (256, 0.005)):
        image = render([[Item(shape, 'yellow', 0.47, 0.52, 0.22)]], size)[0]
        assert image[0].equal(image[1]) and not image[2].any() and image.max() == 255
        assert float(image[0].double().sum() / 255) == pytest.approx(
            area * (0.44 * size) ** 2, rel=tolerance
        )
        rows, columns = (image[0] > 127).nonzero().T
        # y points down: a triangle stands on its base
        assert (
            rows.min() >= 0.30 * size - 1
            and rows.max() <= 0.74 * size
            and columns.min() >= 0.25 * size - 1
        )
        heavier_below = image[0][round(0.52 * size) :].sum(dtype=torch.long) / image[0].sum(
            dtype=torch.long
        )
        assert heavier_below > 0.7 if shape == 'triangle' else 0.42 < heavier_below < 0.58


def test_options():
    fgm = Shapes(images=False, tags=['counting'])
    assert 'x_0' not in fgm[0] and all(fgm.row(i)['tag'] == 'counting' for i in range(9))
    # the captions are those of the items with images
    assert torch.equal(
        Shapes(images=False)[8]['cond']['prompt_embeds'], Shapes()[8]['cond']['prompt_embeds']
    )
    assert Shapes(size=24, encoder=dict(dim=8, pooled_dim=5, max_words=7))[0]['x_0'].shape == (
        3,
        24,
        24,
    )
    for kwargs in (dict(tags=['spelling']), dict(tags=[]), dict(length=0)):
        with pytest.raises(UsageError, match='at least 1 item and tasks from'):
            Shapes(**kwargs)
    with pytest.raises(UsageError, match="no task 'spelling'"):
        sample_scene(np.random.default_rng(0), 'spelling')


def test_a_smaller_world():
    world = dict(
        shapes=['circle', 'cross'],
        colors=['red', 'white'],
        radii=[(0.3, 0.35), (0.18, 0.21), (0.17, 0.19), (0.16, 0.18)],
    )
    shapes = Shapes(seed=1, world=world)
    assert shapes.row(0) == ShapePrompts(10, seed=1, world=world).row(0)
    scenes = [shapes.scene(i)[1] for i in range(120)]
    for index, scene in enumerate(scenes):
        assert {item.shape for item in scene} <= set(world['shapes'])
        assert {item.color for item in scene} <= set(world['colors'])
        low, high = world['radii'][len(scene) - 1]
        assert all(low <= item.r <= high for item in scene)
        words = set(shapes.row(index)['prompt'].split())
        assert not words & {'square', 'squares', 'triangle', 'triangles', 'blue'}
    assert {len(scene) for scene in scenes} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    'world, message',
    [
        (dict(shapes=['circle']), 'at least two shapes'),
        (dict(colors=['red', 'pink']), 'at least two colors'),
        (dict(radii=[(0.1, 0.2)]), 'radii of one to 4'),
        (dict(radii=[(0.1, 0.2)] * 3 + [(0.2, 0.3)]), 'radii of 4 objects'),
        (dict(radii=[(0.3, 0.2)] * 4), 'radii of 1 objects'),
    ],
)
def test_no_such_world(world, message):
    with pytest.raises(UsageError, match=message):
        Shapes(world=world)


def test_prompts_of_an_evaluation():
    prompts = DATASETS.build(dict(type='ShapePrompts', num_samples=10, seed=3))
    assert len(prompts) == 10
    batch = prompts.__getitems__([0, 9, 10, 11])  # 10 and 11 are padding
    assert set(batch) == {'idx', 'seed', 'cond'}
    assert batch['idx'].tolist() == [0, 9, 10, 11] and len(batch['seed'].unique()) == 4
    assert prompts.row(9) == Shapes(seed=3).row(9)
    assert torch.equal(
        batch['cond']['pooled_embeds'][1], Shapes(seed=3)[9]['cond']['pooled_embeds']
    )
    other = ShapePrompts(10, seed=4).__getitems__(range(10))['seed']
    assert other.max() < 2**32 and not set(other.tolist()) & set(
        prompts.__getitems__(range(10))['seed'].tolist()
    )


def test_encoder():
    encoder = WordEncoder(dim=16, pooled_dim=24, max_words=7)
    prompts = [
        'a red circle and a blue square',
        'a blue circle and a red square',
        'a blue square and a red circle',
        '',
        'a',
    ]
    out = encoder.encode(prompts)
    assert out['prompt_embeds'].shape == (5, 7, 16) and out['pooled_embeds'].shape == (5, 24)
    # the same words in another order, but another caption
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (out['pooled_embeds'][a] - out['pooled_embeds'][b]).pow(2).mean() > 0.3
        assert (out['prompt_embeds'][a] - out['prompt_embeds'][b]).pow(2).mean() > 0.1
    assert (out['prompt_embeds'][0, 0] - out['prompt_embeds'][0, 4]).pow(
        2
    ).mean() > 0.2  # both are "a"
    assert not out['prompt_embeds'][3].any() and not out['pooled_embeds'][3].any()
    assert out['prompt_embeds'][4, 0].all() and not out['prompt_embeds'][4, 1:].any()
    torch.testing.assert_close(out['pooled_embeds'][[0, 1, 2, 4]].pow(2).mean(1), torch.ones(4))
    # a prompt's embeddings do not depend on its company
    assert all(torch.equal(encoder.encode(prompts[1:2])[k][0], out[k][1]) for k in out)
    assert not torch.equal(
        WordEncoder(16, 24, 7, seed=1).encode(prompts)['pooled_embeds'], out['pooled_embeds']
    )
    wide = WordEncoder(dim=4096).encode(SHAPES)['prompt_embeds'][:, 0]
    assert (
        wide.var(1).tolist() == pytest.approx([1] * 4, abs=0.1) and wide.mean(1).abs().max() < 0.1
    )


@pytest.mark.parametrize(
    'prompt, message',
    [
        (
            'a red hexagon',
            "the word 'hexagon' of the prompt 'a red hexagon' is unknown; use a, and, of",
        ),
        ('a red circle and a blue square and', 'has 8 words, but max_words=7; raise it'),
    ],
)
def test_prompts_that_cannot_be_encoded(prompt, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        WordEncoder(max_words=7).encode(['a', prompt])


def test_all_prompts_have_their_own_embeddings():
    shapes = Shapes(length=3000, images=False, encoder=dict(pooled_dim=16))
    prompts = list({shapes.row(i)['prompt'] for i in range(3000)})
    distance = torch.cdist(
        *[shapes.encoder.encode(prompts)['pooled_embeds']] * 2
    ) + 1e3 * torch.eye(len(prompts))
    assert distance.min() > 0.5


def test_zero_prompt_is_the_empty_one():
    null = TASK_UTILS.build(dict(type='ZeroPrompt'))
    cond = {**WordEncoder().encode(['a circle', 'two squares']), 'other': torch.ones(2)}
    empty = null(cond)
    assert all(torch.equal(empty[k], v) for k, v in WordEncoder().encode(['', '']).items())
    assert (
        torch.equal(empty['other'], cond['other'])
        and cond['prompt_embeds'].any()
        and null == ZeroPrompt()
    )
    # linear in the conditions, so that guidance is known: 0 + 3 (v - 0)
    x = torch.zeros(2, 64)
    guided = ClassifierFreeGuidance(3, null)(
        lambda x, t, pooled_embeds, **_: pooled_embeds, x, torch.zeros(2), cond
    )
    torch.testing.assert_close(guided, 3 * cond['pooled_embeds'])
