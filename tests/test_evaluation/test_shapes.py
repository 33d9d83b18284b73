# Copyright (c) mmfgm authors.
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from scipy import ndimage

import mmfgm.engine  # noqa: F401
from mmfgm.datasets import Shapes
from mmfgm.datasets.shapes import COLORS, SHAPES, TAGS, Item, render
from mmfgm.errors import UsageError
from mmfgm.evaluation import Evaluation
from mmfgm.evaluation.shapes import detect, verdict
from mmfgm.models import Sampling, from_uint8
from mmfgm.registry import METRICS
from tests.conftest import run_module

N = 1200
PROMPTS = dict(type='ShapePrompts', num_samples=101, seed=5)


def judge_all(rows, images):
    return [verdict(row, found) for row, found in zip(rows, detect(images))]


@pytest.fixture(scope='module')
def scenes():
    """Rows, objects and images."""
    shapes = Shapes(seed=7)
    rows, items = zip(*map(shapes.scene, range(N)))
    return rows, items, render(items, 32)


@pytest.mark.parametrize('size', [24, 32, 64])
def test_the_detector_sees_exactly_what_is_there(scenes, size):
    rows, items, _ = scenes
    images = render(items, size)
    for objects, (boxes, colors) in zip(items, detect(images)):
        assert sorted((item.shape, item.color) for item in objects) == sorted(
            (s, c) for s in boxes for c in colors[s]
        )
        for item in objects:
            box = size * np.array(
                [item.x - item.r, item.y - item.r, item.x + item.r, item.y + item.r]
            )
            # a pixel, but for the thin tip of a triangle
            assert (
                abs(boxes[item.shape][:, :4] - box).max(1)
                < (2.5 if item.shape == 'triangle' else 1)
            ).any()
    assert [v.reason for v in judge_all(rows, images)] == [''] * N


def test_scores_depend_on_the_shape_alone(scenes):
    found = [boxes for boxes, _ in detect(scenes[2])]
    scores = np.concatenate([rows[:, 4] for boxes in found for rows in boxes.values()])
    assert scores.min() > 0.85 and scores.max() <= 1
    # an ellipse and a bar overlap their templates less than any shape does
    image = render([[Item('square', 'red', 0.5, 0.5, 0.2)]], 32)
    squeezed = image.clone()
    squeezed[..., :14, :] = squeezed[..., 18:, :] = 0
    ((boxes, _),) = detect(squeezed)
    assert all(rows[:, 4].max() < 0.7 for rows in boxes.values())


@pytest.mark.parametrize('spoil', ['noise', 'blur', 'both'])
def test_moderate_noise_and_blur_change_little(scenes, spoil):
    images = scenes[2].double().numpy()
    if spoil != 'noise':
        images = ndimage.gaussian_filter(images, (0, 0, 0.6, 0.6))
    if spoil != 'blur':
        images = images + np.random.default_rng(0).normal(0, 10, images.shape)
    spoilt = torch.from_numpy(images.round().clip(0, 255)).to(torch.uint8)
    assert np.mean([v.correct for v in judge_all(scenes[0], spoilt)]) > 0.98


def without_one(row, items):
    return items[1:]


def one_more(row, items):
    # in the corner that is farthest from the others
    x, y = max(
        ((x, y) for x in (0.16, 0.84) for y in (0.16, 0.84)),
        key=lambda c: min(max(abs(c[0] - i.x), abs(c[1] - i.y)) for i in items),
    )
    if min(max(abs(x - i.x), abs(y - i.y)) - i.r for i in items) < 0.13 + 1.5 / 32:
        return None  # no room
    return [*items, Item(items[0].shape, items[0].color, x, y, 0.13)]


def recoloured(row, items):
    colors = list(COLORS)
    return [
        item._replace(color=colors[(colors.index(item.color) + 1) % len(colors)]) for item in items
    ]


def colors_swapped(row, items):
    return [items[0]._replace(color=items[1].color), items[1]._replace(color=items[0].color)]


def places_swapped(row, items):
    a, b = items
    return [a._replace(x=b.x, y=b.y), b._replace(x=a.x, y=a.y)]


def other_shapes(row, items):
    return [item._replace(shape=SHAPES[(SHAPES.index(item.shape) + 1) % 4]) for item in items]


@pytest.mark.parametrize(
    'tag, change, reason',
    [
        ('single_object', without_one, r'expected (\w+)>=1, found 0'),
        ('single_object', other_shapes, r'expected (\w+)>=1, found 0'),
        ('two_object', without_one, r'expected (\w+)>=1, found 0'),
        ('counting', without_one, r'expected (\w+)>=\d, found \d'),
        ('counting', one_more, r'expected (\w+)<\d, found \d'),
        ('counting', other_shapes, r'expected (\w+)>=\d, found 0'),
        ('colors', recoloured, r'expected (\w+) (\w+)>=1, found 0 \1; and 1 \w+'),
        ('colors', other_shapes, r'expected (\w+)>=1, found 0'),
        (
            'position',
            places_swapped,
            r'expected (\w+) (left of|right of|above|below) target, found [a-z ]+ target',
        ),
        ('position', without_one, r'expected (\w+)>=1, found 0'),
        ('color_attr', colors_swapped, r'(expected (\w+) (\w+)>=1, found 0 \2; and 1 \w+\n?){2}'),
        ('color_attr', recoloured, r'(expected (\w+) (\w+)>=1, found 0 \2; and 1 \w+\n?){2}'),
    ],
)
def test_wrong_scenes_are_wrong_for_the_right_reason(scenes, tag, change, reason):
    changed = [(row, change(row, items)) for row, items in zip(*scenes[:2]) if row['tag'] == tag]
    rows, items = zip(*((row, items) for row, items in changed if items is not None))
    assert len(rows) > 60
    for row, v in zip(rows, judge_all(rows, render(items, 32))):
        assert not v.correct and re.fullmatch(reason, v.reason), (row, v.reason)


def test_every_row_has_its_own_colour_and_mask():
    # red comes first in the palette, but the green circle is the better one: a third of the red one
    # is missing
    image = render(
        [[Item('circle', 'red', 0.25, 0.3, 0.2), Item('circle', 'green', 0.7, 0.7, 0.2)]], 32
    )
    image[..., :8, :8] = 0
    for color in ('red', 'green'):
        row = dict(tag='colors', include=[{'class': 'circle', 'count': 1, 'color': color}])
        v = verdict(row, detect(image)[0], dict(threshold=0.3))
        assert v.correct == (color == 'green') and len(v.kept['circle']) == 2
    # squares between the arms of a cross, inside its box
    corners = [Item('square', 'red', x, y, 0.12) for x in (0.18, 0.82) for y in (0.18, 0.82)]
    ((boxes, colors),) = detect(render([[Item('cross', 'red', 0.5, 0.5, 0.45), *corners]], 32))
    assert colors == dict(cross=['red'], square=['red'] * 4)
    assert all((rows[:, 4] > 0.9).all() and (rows[:, 4] <= 1).all() for rows in boxes.values())


def test_what_is_no_shape_is_not_seen():
    noise = torch.randint(
        0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    red, green, blue = (
        render([[Item('circle', color, 0.5, 0.5, 0.2)]], 32) for color in ('red', 'green', 'blue')
    )
    dim, cyan = (red * 0.55).to(torch.uint8), green + blue
    for boxes, _ in detect(torch.cat([noise, grey, dim, cyan])):
        assert not any((rows[:, 4] > 0.75).any() for rows in boxes.values())


def quality(images):
    prompts = dict(type='ShapePrompts', num_samples=len(images), seed=5)
    metric = METRICS.build(dict(type='ShapeQuality', prompts=prompts))
    metric.reset(len(images))
    metric.process(dict(idx=torch.arange(len(images))), images)
    return metric.evaluate(len(images))


def test_quality_of_renderings_and_of_what_is_worse():
    scenes = [Shapes(seed=5).scene(i)[1] for i in range(N)]
    real = render(scenes, 32)
    assert quality(real) == pytest.approx(dict(noise=0, blur=1, spread=1, size_spread=1), abs=1e-9)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    noisy = (from_uint8(real) + 0.1 * noise).clamp(-1, 1)
    # of three channels, one or two lie on a blend; half of the noise at black is cut off
    assert 0.02 < quality(noisy)['noise'] < 0.05
    soft = ndimage.gaussian_filter(real.double().numpy(), (0, 0, 0.6, 0.6))
    soft = quality(torch.from_numpy(soft.round()).to(torch.uint8))
    assert soft['blur'] > 1.5 and soft['noise'] < 0.01 and 0.97 < soft['spread'] < 1.03


def test_quality_sees_that_a_caption_always_gives_one_picture():
    shapes = Shapes(seed=5)
    first = {}
    same = [first.setdefault(row['prompt'], s) for row, s in map(shapes.scene, range(N))]
    out = quality(render(same, 32))
    assert out['spread'] == out['size_spread'] == 0 and out['noise'] < 1e-9
    # places half as far from the middle of the canvas, where a single object stays right
    alone = [i for i in range(N) if i % 6 in (0, 3)]
    scenes = [shapes.scene(i)[1] for i in range(N)]
    for i in alone:
        (item,) = scenes[i]
        scenes[i] = [item._replace(x=0.25 + item.x / 2, y=0.25 + item.y / 2)]
    for i in set(range(N)) - set(alone):
        scenes[i] = []  # wrong, so it does not count
    out = quality(render(scenes, 32))
    assert abs(out['spread'] - 0.5) < 0.03 and abs(out['size_spread'] - 1) < 0.05
    nothing = quality(torch.zeros(N, 3, 32, 32, dtype=torch.uint8))
    assert nothing == dict(noise=0, blur=0, spread=0, size_spread=0)


class Painter:
    """A model that paints the right scene, unless ``idx`` is a multiple of ``fails``: then
    nothing."""

    def __init__(self, fails=None, seed=5):
        self.shapes, self.fails = Shapes(seed=seed), fails

    def sample(self, batch, sampling):
        images = from_uint8(self.shapes.__getitems__(batch['idx'])['x_0'])
        if self.fails:
            images[batch['idx'] % self.fails == 0] = -1
        return images


def evaluate(batch_size, model, prompts=PROMPTS, **options):
    with DefaultScope.overwrite_default_scope('mmfgm'):
        evaluation = Evaluation(
            name='e',
            sampling=dict(network='generator_ema'),
            batch_size=batch_size,
            dataset=PROMPTS,
            metrics=dict(shapes=dict(type='ShapeScore', prompts=prompts, **options)),
        )
        values = evaluation.run(model, Sampling('generator_ema'))
        assert set(values) == set(evaluation.value_names)
        return values


def main():
    """Run by every process of a torchrun; prints the metric of this world size."""
    MMLogger.get_instance('test')
    dist.init_process_group('gloo')
    out = evaluate(16, Painter(7))
    if dist.get_rank() == 0:
        print('RESULT', json.dumps(out))
    dist.destroy_process_group()


def test_metric():
    perfect = evaluate(64, Painter())
    names = (*TAGS, 'overall', 'overall_low', 'overall_high', 'images', 'prompts')
    assert set(perfect) == {f'e/shapes_{name}' for name in names}
    assert set(perfect.values()) == {1.0}
    out = evaluate(64, Painter(7))
    wrong = {tag: [i % 7 != 0 for i in range(101) if i % 6 == k] for k, tag in enumerate(TAGS)}
    for tag, correct in wrong.items():
        assert out[f'e/shapes_{tag}'] == pytest.approx(np.mean(correct))
    assert out['e/shapes_overall'] == pytest.approx(
        np.mean([np.mean(correct) for correct in wrong.values()])
    )
    assert out['e/shapes_images'] == pytest.approx(1 - 15 / 101)
    # scenes of other captions are right by chance only
    assert evaluate(64, Painter(seed=6))['e/shapes_overall'] < 0.3
    # options are the judge's: at 32 pixels most overlaps with templates are not perfect
    assert evaluate(64, Painter(), options=dict(threshold=0.999))['e/shapes_overall'] < 0.9


def test_metric_does_not_depend_on_batches_or_processes():
    one = {size: evaluate(size, Painter(7)) for size in (7, 64)}
    assert one[7] == one[64]
    # 101 samples on two processes: one sees padding, which must not count
    text = run_module('tests.test_evaluation.test_shapes', nproc=2).stdout
    assert json.loads(re.search('RESULT (.*)', text).group(1)) == one[64]


@pytest.mark.parametrize('prompts', [dict(PROMPTS, seed=6), dict(PROMPTS, encoder=dict(dim=8))])
def test_judging_by_other_prompts_is_noticed(prompts):
    with pytest.raises(UsageError, match='other prompts than ShapeScore judges them by'):
        evaluate(64, Painter(), prompts)


if __name__ == '__main__':
    sys.exit(main())
