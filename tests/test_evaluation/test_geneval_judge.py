# Copyright (c) mmfgm authors.
import dataclasses

import numpy as np
import pytest

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval import judge
from mmfgm.evaluation.geneval.judging.judge import iou, relation

BOX = [0, 0, 10, 10]


def boxes(*scores, box=BOX):
    return np.array([[*box, score] for score in scores], dtype=np.float32)


def at(x, y, score=0.5, width=10, height=10):
    return np.array(
        [[x - width / 2, y - height / 2, x + width / 2, y + height / 2, score]], dtype=np.float32
    )


def clause(name='apple', count=1, **conditions):
    return {'class': name, 'count': count, **conditions}


def meta(*include, tag='colors', exclude=None):
    row = dict(tag=tag, include=list(include), prompt='a photo')
    return row if exclude is None else {**row, 'exclude': exclude}


def no_color(name, rows):
    raise AssertionError('no clause asks for a colour')


def counting(name, count):
    return meta(clause(name, count), tag='counting', exclude=[clause(name, count + 1)])


def test_scores_equal_to_the_threshold_in_float32_are_not_kept():
    limit, above = np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))
    verdict = judge(meta(clause()), {'apple': boxes(limit)}, no_color)
    assert (
        not verdict.correct
        and verdict.reason == 'expected apple>=1, found 0'
        and verdict.kept == {}
    )
    verdict = judge(meta(clause()), {'apple': boxes(limit, above)}, no_color)
    assert verdict.correct and verdict.reason == '' and verdict.kept == {'apple': [1]}


def test_counting_has_its_own_threshold():
    detections = {'apple': boxes(0.5, 0.95, np.float32(0.9))}
    assert judge(meta(clause(), tag='counting'), detections, no_color).kept == {'apple': [1]}
    assert judge(meta(clause(), tag='two_object'), detections, no_color).kept == {
        'apple': [1, 2, 0]
    }


def test_rows_come_in_any_order_and_are_kept_best_first():
    detections = {'apple': boxes(0.4, 0.2, 0.9, 0.31, 0.6), 'cup': boxes(0.3, 0.1)}
    assert judge(meta(clause()), detections, no_color).kept == {'apple': [2, 4, 0, 3]}


def test_ties_are_in_the_order_of_a_reversed_ascending_argsort():
    tied = boxes(0.5, 0.7, 0.5, 0.5, 0.7)
    expected = np.argsort(tied[:, 4])[::-1].tolist()
    assert judge(meta(clause()), {'apple': tied}, no_color).kept == {'apple': expected}


def test_the_best_sixteen_are_kept():
    kept = judge(meta(clause()), {'apple': boxes(*np.linspace(0.4, 0.9, 20))}, no_color).kept[
        'apple'
    ]
    assert kept == [19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4]


@pytest.mark.parametrize('empty', [np.zeros((0, 5), np.float32), np.zeros(0), []])
def test_empty_arrays_and_a_frozen_verdict(empty):
    verdict = judge(
        meta(clause(), exclude=[clause('cup')]), {'apple': empty, 'cup': empty}, no_color
    )
    assert (verdict.correct, verdict.reason, verdict.kept) == (
        False,
        'expected apple>=1, found 0',
        {},
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.correct = True


# overlap


def test_iou_counts_the_last_pixel():
    # 10 x 10 and 10 x 5 pixels
    assert iou([0, 0, 9, 9], [0, 0, 9, 4]) == 0.5
    assert iou([0, 0, 9, 9], [20, 20, 29, 29]) == 0
    # boxes that share one column of ten pixels
    assert iou([0, 0, 9, 9], [9, 0, 18, 9]) == pytest.approx(10 / 190)
    assert iou([5, 5, 4, 4], [5, 5, 4, 4]) == 0


def nms(rows, **options):
    return judge(meta(clause()), {'apple': np.array(rows, np.float32)}, no_color, options).kept[
        'apple'
    ]


def test_overlapping_boxes_are_kept_by_default():
    same = [[*BOX, 0.8], [*BOX, 0.9]]
    assert nms(same) == [1, 0]
    assert nms(same, max_overlap=0.99) == [1]


def test_overlap_equal_to_the_limit_is_dropped():
    assert nms([[0, 0, 9, 9, 0.9], [0, 0, 9, 4, 0.8]], max_overlap=0.5) == [0]
    assert nms([[0, 0, 9, 9, 0.9], [0, 0, 9, 3, 0.8]], max_overlap=0.5) == [0, 1]
    # IoU 60 / 100 is float32(0.6) > 0.6 in float64: equal in float32, and so dropped
    assert nms([[0, 0, 9, 9, 0.9], [0, 0, 9, 5, 0.8]], max_overlap=0.6) == [0]
    # IoU 70 / 100 is float32(0.7) < 0.7 in float64: equal in float32 too
    assert nms([[0, 0, 9, 9, 0.9], [0, 0, 9, 6, 0.8]], max_overlap=0.7) == [0]


def test_a_dropped_box_drops_no_other_and_still_counts_among_the_best_sixteen():
    chain = [[0, 0, 9, 9, 0.9], [0, 5, 9, 14, 0.8], [0, 10, 9, 19, 0.7]]
    assert nms(chain, max_overlap=0.3) == [0, 2]
    assert nms(chain, max_overlap=0.3, max_objects=2) == [0]


def test_overlap_with_another_class_does_not_matter():
    kept = judge(
        meta(clause()), {'apple': boxes(0.9), 'orange': boxes(0.8)}, no_color, dict(max_overlap=0.5)
    ).kept
    assert kept == {'apple': [0], 'orange': [0]}


# counts


def test_three_clocks():
    detections = {'clock': boxes(0.95, 0.5, 0.92, 0.91, 0.7)}
    assert judge(counting('clock', 3), detections, no_color).correct
    assert judge(counting('clock', 2), detections, no_color).reason == 'expected clock<3, found 3'
    assert judge(counting('clock', 4), detections, no_color).reason == 'expected clock>=4, found 3'


def test_an_excluded_count_stops_at_sixteen():
    assert (
        judge(counting('apple', 4), {'apple': boxes(*[0.95] * 20)}, no_color).reason
        == 'expected apple<5, found 16'
    )


def test_every_clause_gives_its_reason_and_excluded_ones_come_last():
    row = meta(
        clause('cup', 2),
        clause('dog'),
        clause('apple'),
        exclude=[clause('cat', 2), clause('cup'), clause('tie')],
    )
    verdict = judge(row, {'cup': boxes(0.5), 'cat': boxes(0.5, 0.6), 'apple': boxes(0.9)}, no_color)
    assert verdict.reason.split('\n') == [
        'expected cup>=2, found 1',
        'expected dog>=1, found 0',
        'expected cat<2, found 2',
        'expected cup<1, found 1',
    ]


# colours


def painted(colors, calls=None):

    def classify_color(name, rows):
        if calls is not None:
            calls.append((name, rows))
        return [colors[row] for row in rows]

    return classify_color


def test_colour_is_asked_of_the_best_boxes_only():
    calls, detections = [], {'apple': boxes(0.4, 0.9, 0.6), 'cup': boxes(0.9)}
    verdict = judge(meta(clause(color='red')), detections, painted(['red', 'green', 'red'], calls))
    assert verdict.reason == 'expected red apple>=1, found 0 red; and 1 green'
    assert calls == [('apple', [1])]
    assert judge(meta(clause(color='green')), detections, painted(['red', 'green', 'red'])).correct


def test_colours_found_are_listed_in_the_order_of_the_ten():
    row, detections = meta(clause(count=4, color='black')), {'apple': boxes(0.9, 0.8, 0.7, 0.6)}
    verdict = judge(row, detections, painted(['white', 'black', 'red', 'white']))
    assert verdict.reason == 'expected black apple>=4, found 1 black; and 1 red, 1 black, 2 white'
    assert judge(row, detections, painted(['black'] * 4)).correct


def test_too_few_boxes_are_not_asked_for_their_colour():
    row = meta(clause(count=2, color='red'))
    assert judge(row, {'apple': boxes(0.9)}, no_color).reason == 'expected apple>=2, found 1'


def test_color_attribution_asks_each_class():
    row = meta(clause('apple', color='red'), clause('cup', color='blue'), tag='color_attr')
    detections = {'apple': boxes(0.9), 'cup': boxes(0.9)}
    verdict = judge(
        row, detections, lambda name, rows: [dict(apple='blue', cup='red')[name] for _ in rows]
    )
    assert (
        verdict.reason == 'expected red apple>=1, found 0 red; and 1 blue\n'
        'expected blue cup>=1, found 0 blue; and 1 red'
    )


def test_wrong_number_of_colours():
    with pytest.raises(ValueError, match="for 1 boxes of class 'apple'"):
        judge(meta(clause(color='red')), {'apple': boxes(0.9)}, lambda name, rows: ['red', 'red'])


# positions


@pytest.mark.parametrize(
    'x, y, expected',
    [
        (-50, 0, ['left of']),
        (50, 0, ['right of']),
        (0, -50, ['above']),
        (0, 50, ['below']),
        (-50, -50, ['left of', 'above']),
        (50, 50, ['right of', 'below']),
        (0, 0, []),
        (50, 25, ['right of']),
    ],
)
def test_relation(x, y, expected):
    assert relation(at(x, y)[0], at(0, 0)[0]) == expected


def test_relation_shortens_the_offset_by_the_sizes_but_not_the_norm():
    # 10 - 0.1 * 50 = 5, and 5 / 10 is not above a half
    for x, y in ((10, 0), (-10, 0), (0, 10), (0, -10)):
        assert relation(at(x, y, width=25, height=25)[0], at(0, 0, width=25, height=25)[0]) == []
    # 10 - 0.1 * 49 = 5.1; widths with the last pixel would give 4.9
    assert relation(at(10, 0, width=24)[0], at(0, 0, width=25)[0]) == ['right of']
    # 4 / 10, where 4 / 4 would be a relation
    assert relation(at(10, 0, width=30)[0], at(0, 0, width=30)[0]) == []
    # an axis that is shortened to nothing still counts in the norm: 3 / 5 and 2.4 / 5
    assert relation(at(3, 4, width=0, height=20)[0], at(0, 0, width=0, height=20)[0]) == [
        'right of'
    ]
    assert relation(at(3, 4, width=3, height=20)[0], at(0, 0, width=3, height=20)[0]) == []
    # 0.0005 is below the smallest offset that counts
    assert relation(at(0.0005, 0, width=0, height=0)[0], at(0, 0, width=0, height=0)[0]) == []
    assert relation(at(0.002, 0, width=0, height=0)[0], at(0, 0, width=0, height=0)[0]) == [
        'right of'
    ]


def test_position_threshold():
    a, b = at(10, 0, width=25), at(0, 0, width=25)
    assert relation(a[0], b[0], 0.09) == ['right of']
    row = meta(clause('cup'), clause('dog', position=['right of', 0]), tag='position')
    assert not judge(row, dict(dog=a, cup=b), no_color).correct
    assert judge(row, dict(dog=a, cup=b), no_color, dict(position_threshold=0.09)).correct


@pytest.mark.parametrize(
    'x, y, found', [(50, 0, 'right of'), (50, -50, 'right of and above'), (0, 0, '')]
)
def test_position_reasons(x, y, found):
    row = meta(clause('cup'), clause('dog', position=['left of', 0]), tag='position')
    verdict = judge(row, dict(dog=at(x, y), cup=at(0, 0)), no_color)
    assert verdict.reason == f'expected dog left of target, found {found} target'
    assert judge(row, dict(dog=at(-50, y), cup=at(0, 0)), no_color).correct


def test_a_missing_target_gives_two_reasons():
    row = meta(clause('cup'), clause('dog', position=['left of', 0]), tag='position')
    assert (
        judge(row, dict(dog=at(0, 0)), no_color).reason
        == 'expected cup>=1, found 0\nno target for dog to be left of'
    )
    assert judge(row, dict(cup=at(0, 0)), no_color).reason == 'expected dog>=1, found 0'


def test_a_clause_of_the_wrong_colour_or_place_is_no_target():
    row = meta(
        clause('cup', color='red'),
        clause('dog', position=['left of', 0]),
        clause('cat', position=['above', 1]),
    )
    verdict = judge(row, dict(cup=at(0, 0), dog=at(-50, 0), cat=at(0, -50)), painted(['blue']))
    assert verdict.reason.split('\n') == [
        'expected red cup>=1, found 0 red; and 1 blue',
        'no target for dog to be left of',
        'no target for cat to be above',
    ]


def test_a_clause_of_the_wrong_colour_is_not_asked_for_its_place():
    row = meta(clause('cup'), clause('dog', color='red', position=['left of', 0]))
    detections = dict(cup=at(0, 0), dog=at(50, 0))
    assert (
        judge(row, detections, painted(['blue'])).reason
        == 'expected red dog>=1, found 0 red; and 1 blue'
    )


def test_every_pair_must_stand_in_the_relation_and_the_first_that_fails_is_told():
    row = meta(clause('cup', 2), clause('dog', 2, position=['left of', 0]))
    # the first row of each is not among the best two
    cups = np.concatenate([at(-200, 0, 0.7), at(0, 0, 0.9), at(100, 0, 0.8)])
    dogs = np.concatenate([at(500, 0, 0.5), at(50, -100, 0.8), at(-50, 0, 0.9)])
    # dog -50 is left of both cups; dog 50 is above cup 0
    assert (
        judge(row, dict(cup=cups, dog=dogs), no_color).reason
        == 'expected dog left of target, found above target'
    )
    # right of cup 0, though left of cup 100, which comes first
    dogs[1], cups[1:, 4] = at(50, 0, 0.8), (0.8, 0.9)
    assert (
        judge(row, dict(cup=cups, dog=dogs), no_color).reason
        == 'expected dog left of target, found right of target'
    )
    dogs[1] = at(-60, 0, 0.8)
    assert judge(row, dict(cup=cups, dog=dogs), no_color).correct


# mistakes of the caller


@pytest.mark.parametrize(
    'options, kept',
    [
        (dict(threshold=0.45), [2, 1]),
        (dict(max_objects=1), [2]),
        (dict(counting_threshold=0.99), [2, 1, 0]),
        ({}, [2, 1, 0]),
    ],
)
def test_options(options, kept):
    assert judge(meta(clause()), {'apple': boxes(0.4, 0.5, 0.6)}, no_color, options).kept == {
        'apple': kept
    }
    assert judge(
        meta(clause(), tag='counting'),
        {'apple': boxes(0.4)},
        no_color,
        dict(counting_threshold=0.2),
    ).correct


@pytest.mark.parametrize(
    'options, match',
    [
        (dict(treshold=0.3), 'treshold'),
        (dict(threshold='high'), "'high'"),
        (dict(max_objects=1.5), 'max_objects'),
        (dict(max_objects=-1), 'max_objects'),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(UsageError, match=match):
        judge(meta(clause()), {}, no_color, options)


@pytest.mark.parametrize(
    'row, match',
    [
        (dict(include=[]), "'tag'"),
        (dict(tag='colors'), "'include'"),
        (meta({'class': 'cup'}), "'count'"),
        (meta({'count': 1}), "'class'"),
        (meta(clause(color='mauve')), "'mauve'"),
        (meta(clause(count=0)), "'count'"),
        (meta(clause(), clause(position=['beside', 0])), "'beside'"),
        (meta(clause(), clause(position=['above', 1])), 'refers to 1'),
        (meta(clause(), clause(position=['above', -1])), 'refers to -1'),
        (meta(clause(), clause(position='above')), "'above'"),
        (meta(clause(), exclude=[{'class': 'cup'}]), r"exclude\[0\] lacks 'count'"),
        (meta('cup'), "'cup'"),
        ([], r'\[\]'),
    ],
)
def test_bad_metadata(row, match):
    with pytest.raises(UsageError, match=match):
        judge(row, {}, no_color)


def test_boxes_of_another_shape():
    with pytest.raises(ValueError, match=r"'apple'.*\(1, 4\)"):
        judge(meta(clause()), {'apple': np.zeros((1, 4))}, no_color)
