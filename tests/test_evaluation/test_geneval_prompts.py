# Copyright (c) mmfgm authors.
import hashlib
import json
from collections import Counter

import pytest

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval import generate, read_metadata
from mmfgm.evaluation.geneval.judging.prompts import COLORS, OBJECT_NAMES, to_jsonl

# of evaluation_metadata.jsonl in djghosh13/geneval
REFERENCE = '5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13'
CUP = {'class': 'cup', 'count': 1}


def row(*include, **others):
    return dict(tag='mine', include=list(include), prompt='a photo of a cup', **others)


def test_the_prompts_of_the_paper_byte_for_byte():
    assert hashlib.sha256(to_jsonl(generate()).encode()).hexdigest() == REFERENCE


def test_counts_in_order():
    assert list(Counter(row['tag'] for row in generate()).items()) == [
        ('single_object', 80),
        ('two_object', 99),
        ('counting', 80),
        ('colors', 94),
        ('position', 100),
        ('color_attr', 100),
    ]


def test_rows_are_distinct_and_their_first_occurrence_stays():
    lines = to_jsonl(generate(n=400)).splitlines()
    assert len(lines) == len(set(lines))
    assert len(lines) < 80 + 5 * 400
    # the first of a longer draw are those of a shorter one, up to the first task that is longer
    assert lines[:179] == to_jsonl(generate()).splitlines()[:179]


def test_seed_and_number():
    assert to_jsonl(generate(seed=44)) != to_jsonl(generate())
    assert to_jsonl(generate(seed=44)) == to_jsonl(generate(seed=44))
    assert [row['tag'] for row in generate(n=0)] == ['single_object'] * 80


def test_names():
    assert len(OBJECT_NAMES) == len(set(OBJECT_NAMES)) == 80
    assert (OBJECT_NAMES[0], OBJECT_NAMES[39], OBJECT_NAMES[79]) == (
        'person',
        'bottle',
        'toothbrush',
    )
    assert OBJECT_NAMES[64:67] == ('computer mouse', 'tv remote', 'computer keyboard')
    assert COLORS == (
        'red',
        'orange',
        'yellow',
        'green',
        'blue',
        'purple',
        'pink',
        'brown',
        'black',
        'white',
    )


def test_read_what_was_written(tmp_path):
    path = tmp_path / 'prompts.jsonl'
    path.write_text(to_jsonl(generate()))
    assert read_metadata(path) == generate()
    mine = row(
        CUP,
        {'class': 'dog', 'count': 2, 'color': 'red', 'position': ['above', 0]},
        exclude=[CUP],
        note='extra',
    )
    path.write_text(f'\n{json.dumps(mine)}\n\n')
    assert read_metadata(str(path)) == [mine]


@pytest.mark.parametrize(
    'bad, match',
    [
        ('{"tag": ', 'not a JSON object'),
        ('["cup"]', 'expected an object'),
        (dict(include=[CUP], prompt='a photo'), "'tag' is missing"),
        (dict(tag='mine', prompt='a photo'), "'include' is missing"),
        (dict(tag='mine', include=[CUP]), "'prompt' is missing"),
        (dict(tag='mine', include=[CUP], prompt=3), "'prompt' must be a text"),
        (dict(tag='../../x', include=[CUP], prompt='a cup'), "'tag' must be letters"),
        (dict(tag='', include=[CUP], prompt='a cup'), "'tag' must be letters"),
        (dict(tag='mine', include=CUP, prompt='a photo'), "'include' must be a list"),
        (row({'class': 'cup'}), r"include\[0\] lacks 'count'"),
        (row({**CUP, 'count': '2'}), "'count' of .*'2'"),
        (row({**CUP, 'count': 0}), "'count' of .*0"),
        (row({**CUP, 'count': True}), "'count' of .*True"),
        (row(CUP, {**CUP, 'class': 'mouse'}), r"'class' of include\[1\] .*'mouse'"),
        (row({**CUP, 'class': 3}), "'class' of .*3"),
        (row(CUP, exclude=[{**CUP, 'class': 'remote'}]), r"'class' of exclude\[0\] .*'remote'"),
        (row({**CUP, 'color': 'mauve'}), "'color' of .*'mauve'"),
        (row(CUP, {**CUP, 'position': ['beside', 0]}), "'position' of .*'beside'"),
        (row(CUP, {**CUP, 'position': ['above']}), r"'position' of .*\['above'\]"),
        (row(CUP, {**CUP, 'position': ['above', 1]}), 'refers to 1'),
        (row({**CUP, 'position': ['above', 1]}, CUP), 'refers to 1'),
        (row({**CUP, 'position': ['above', 0]}), 'refers to 0'),
        (row(CUP, {**CUP, 'position': ['above', -1]}), 'refers to -1'),
        (row(CUP, {**CUP, 'position': ['above', '0']}), "refers to '0'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, match):
    path = tmp_path / 'prompts.jsonl'
    text = bad if isinstance(bad, str) else json.dumps(bad)
    path.write_text(f'{json.dumps(row(CUP))}\n{text}\n')
    with pytest.raises(UsageError, match=f'prompts.jsonl, line 2: .*{match}'):
        read_metadata(path)


def test_files_that_have_no_prompts(tmp_path):
    with pytest.raises(UsageError, match="missing.jsonl' cannot be read"):
        read_metadata(tmp_path / 'missing.jsonl')
    (tmp_path / 'empty.jsonl').write_text('\n')
    with pytest.raises(UsageError, match='empty.jsonl has no'):
        read_metadata(tmp_path / 'empty.jsonl')
    (tmp_path / 'binary.jsonl').write_bytes(b'\xff\xfe')
    with pytest.raises(UsageError, match="binary.jsonl' cannot be read"):
        read_metadata(tmp_path / 'binary.jsonl')
