# Copyright (c) mmfgm authors.
import numpy as np
import pytest

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval import summarize


def verdicts(tag, prompt, *correct):
    return [
        dict(
            filename=f'{i:04d}.png',
            tag=tag,
            prompt=prompt,
            correct=bool(value),
            reason='',
            details='{}',
            metadata=f'{{"tag": "{tag}", "prompt": "{prompt}"}}',
        )
        for i, value in enumerate(correct)
    ]


ROWS = (
    verdicts('colors', 'a', 1, 0, 0, 0)
    + verdicts('colors', 'b', 0, 0, 0, 0)
    + verdicts('counting', 'a', 1, 1)
    + verdicts('counting', 'b', 1, 0)
    + verdicts('counting', 'c', 0, 0)
)


def test_scores():
    scores = summarize(ROWS)
    assert list(scores) == [
        'colors',
        'counting',
        'overall',
        'overall_low',
        'overall_high',
        'images',
        'prompts',
    ]
    assert scores['colors'] == 1 / 8
    assert scores['counting'] == 3 / 6
    # tasks weigh the same, whatever their size; images do not
    assert scores['overall'] == (1 / 8 + 3 / 6) / 2
    assert scores['images'] == 4 / 14
    assert scores['prompts'] == 3 / 5
    assert all(type(score) is float for score in scores.values())


def test_a_prompt_with_more_images_weighs_more_in_its_task():
    scores = summarize(verdicts('colors', 'a', 1) + verdicts('colors', 'b', 0, 0, 0))
    assert scores['colors'] == 1 / 4
    assert scores['prompts'] == 1 / 2


def test_prompts_are_grouped_by_their_metadata():
    same_text = verdicts('colors', 'a', 1) + verdicts('counting', 'a', 0)
    assert summarize(same_text)['prompts'] == 1 / 2
    for row in (same := verdicts('colors', 'a', 1) + verdicts('colors', 'b', 0)):
        row['metadata'] = '{}'
    assert summarize(same)['prompts'] == 1


def test_interval_of_one_task_is_that_of_a_binomial():
    # prompts whose images agree: the resampled score is Binomial(400, 0.25) / 400, of deviation
    # 0.02165
    rows = [row for i in range(400) for row in verdicts('colors', f'{i}', *[i % 4 == 0] * 4)]
    scores = summarize(rows)
    assert scores['overall_low'] == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.004)
    assert scores['overall_high'] == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.004)


def test_interval_resamples_prompts_within_tasks():
    # within a task all prompts agree, so nothing varies; over all prompts or single images it would
    rows = [row for i in range(20) for row in verdicts('colors', f'{i}', 1, 0, 0, 0)]
    rows += [row for i in range(20) for row in verdicts('counting', f'{i}', 1, 1, 1, 1)]
    scores = summarize(rows)
    assert scores['overall_low'] == scores['overall'] == scores['overall_high'] == 0.625


def test_interval_of_two_tasks_is_narrower():
    one = [row for i in range(400) for row in verdicts('colors', f'{i}', i % 2)]
    two = one + [row for i in range(400) for row in verdicts('counting', f'{i}', i % 2)]
    width_one, width_two = (
        scores['overall_high'] - scores['overall_low']
        for scores in (summarize(one), summarize(two))
    )
    assert width_two / width_one == pytest.approx(2**-0.5, abs=0.07)


def test_interval_is_seeded_and_does_not_depend_on_the_order_of_rows():
    shuffled = [ROWS[i] for i in np.random.default_rng(0).permutation(len(ROWS))]
    first, again, other = (
        summarize(ROWS),
        summarize(shuffled),
        summarize(ROWS, resamples=999, seed=1),
    )
    assert first == again == summarize(ROWS) == summarize(ROWS[::-1])
    assert first['overall_low'] < first['overall'] < first['overall_high']
    assert {key: other[key] for key in ('overall', 'images')} == {
        key: first[key] for key in ('overall', 'images')
    }
    many = [
        row for i in range(50) for row in verdicts('colors', f'{i}', *(i % 7 > j for j in range(4)))
    ]
    ends = {
        (summarize(many, seed=seed)['overall_low'], summarize(many, seed=seed)['overall_high'])
        for seed in range(5)
    }
    assert len(ends) > 1
    both = many + [
        row
        for i in range(30)
        for row in verdicts('counting', f'{i}', *(i % 5 > j for j in range(3)))
    ]
    assert summarize(both) == summarize(both[::-1])


def test_mistakes():
    with pytest.raises(UsageError, match='no GenEval verdicts'):
        summarize([])
    with pytest.raises(UsageError, match="lacks 'correct'"):
        summarize([dict(tag='colors', metadata='{}')])
    with pytest.raises(UsageError, match="'overall' has the name"):
        summarize(verdicts('overall', 'a', 1))
