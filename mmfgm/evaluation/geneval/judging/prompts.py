# Copyright (c) mmfgm authors.
"""GenEval's prompts (Ghosh et al., 2023): the 553 of the paper, others like them, and files of a
user's own."""

import json
import re
from pathlib import Path

import numpy as np

from mmfgm.errors import UsageError
from mmfgm.files import parse_json, read_text

# COCO's classes in order, but for the names of 64, 65 and 66: match a detector's classes by index,
# not by name
OBJECT_NAMES = tuple(
    ' '.join(
        """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball
bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
""".split()
    ).split(', ')
)
COLORS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown', 'black', 'white')
RELATIONS = ('left of', 'right of', 'above', 'below')


def _a(name: str) -> str:
    return f'{"an" if name[0] in "aeiou" else "a"} {name}'


def _many(name: str) -> str:
    # the reference's rule: "es" after s, else "s", so also "sandwichs"
    return name + ('es' if name.endswith('s') else 's')


def _clause(name: str, count: int = 1, **conditions) -> dict:
    return {'class': name, 'count': count, **conditions}


def _two_object(rng: np.random.Generator) -> dict:
    a, b = (OBJECT_NAMES[i] for i in rng.choice(80, 2, replace=False))
    return dict(
        tag='two_object', include=[_clause(a), _clause(b)], prompt=f'a photo of {_a(a)} and {_a(b)}'
    )


def _counting(rng: np.random.Generator) -> dict:
    name = OBJECT_NAMES[rng.choice(80)]
    count = int(rng.integers(2, 5))
    return dict(
        tag='counting',
        include=[_clause(name, count)],
        exclude=[_clause(name, count + 1)],
        prompt=f'a photo of {("two", "three", "four")[count - 2]} {_many(name)}',
    )


def _colors(rng: np.random.Generator) -> dict:
    # + 1 leaves out persons, whom no prompt colours
    name = OBJECT_NAMES[rng.choice(79) + 1]
    color = COLORS[rng.choice(10)]
    return dict(
        tag='colors', include=[_clause(name, color=color)], prompt=f'a photo of {_a(color)} {name}'
    )


def _position(rng: np.random.Generator) -> dict:
    a, b = (OBJECT_NAMES[i] for i in rng.choice(80, 2, replace=False))
    wanted = RELATIONS[rng.choice(4)]
    # the target comes first: a clause can only refer to an earlier one
    return dict(
        tag='position',
        include=[_clause(b), _clause(a, position=[wanted, 0])],
        prompt=f'a photo of {_a(a)} {wanted} {_a(b)}',
    )


def _color_attr(rng: np.random.Generator) -> dict:
    a, b = (OBJECT_NAMES[i + 1] for i in rng.choice(79, 2, replace=False))
    color_a, color_b = (COLORS[i] for i in rng.choice(10, 2, replace=False))
    return dict(
        tag='color_attr',
        include=[_clause(a, color=color_a), _clause(b, color=color_b)],
        prompt=f'a photo of {_a(color_a)} {a} and {_a(color_b)} {b}',
    )


def generate(seed: int = 43, n: int = 100) -> list[dict]:
    """GenEval's prompts; the defaults give the 553 of the paper, bit for bit.

    Args:
        seed (int): Seed of the draw.
        n (int): Prompts drawn for each task but the first, which has one per class. Duplicates are
            dropped.

    Returns:
        list[dict]: Rows ``dict(tag, include, [exclude], prompt)``, a task after the other.
    """
    rng = np.random.default_rng(seed)
    rows = [
        dict(
            tag='single_object',
            include=[_clause(OBJECT_NAMES[i])],
            prompt=f'a photo of {_a(OBJECT_NAMES[i])}',
        )
        for i in rng.choice(80, 80, replace=False)
    ]
    # one stream of random numbers: the order of the tasks is part of the definition
    for draw in (_two_object, _counting, _colors, _position, _color_attr):
        rows += [draw(rng) for _ in range(n)]
    # a dict keeps a key where it came first
    return list({json.dumps(row): row for row in rows}.values())


def to_jsonl(rows: list[dict]) -> str:
    """Rows as the text of a prompt file: one JSON object a line, as the reference writes them."""
    return ''.join(json.dumps(row) + '\n' for row in rows)


def check_clauses(row: dict) -> None:
    """Hold the clauses of a row against what :func:`~mmfgm.evaluation.geneval.judge` can decide.

    Class names are not looked at.

    Raises:
        UsageError: Names the key that is missing, or the one with a bad value.
    """
    if not isinstance(row, dict):
        raise UsageError(f'expected an object with tag, include and prompt, but found {row!r}')
    for key in ('tag', 'include'):
        if key not in row:
            raise UsageError(f'{key!r} is missing in {row}; add it')
    for key in ('include', 'exclude'):
        clauses = row.get(key, [])
        if not isinstance(clauses, (list, tuple)):
            raise UsageError(f'{key!r} must be a list of clauses, but is {clauses!r}')
        for index, clause in enumerate(clauses):
            _check_clause(clause, index, f'{key}[{index}]', conditions=key == 'include')


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_clause(clause: dict, index: int, where: str, conditions: bool) -> None:
    if not isinstance(clause, dict):
        raise UsageError(f'{where} must be an object with class and count, but is {clause!r}')
    for key in ('class', 'count'):
        if key not in clause:
            raise UsageError(f'{where} lacks {key!r}: {clause}')
    if not isinstance(clause['class'], str):
        raise UsageError(f"'class' of {where} must be a name, but is {clause['class']!r}")
    if not _whole(clause['count']) or clause['count'] < 1:
        raise UsageError(
            f"'count' of {where} must be a whole number from 1, but is {clause['count']!r}"
        )
    if not conditions:
        return
    if 'color' in clause and clause['color'] not in COLORS:
        raise UsageError(
            f"'color' of {where} must be one of {', '.join(COLORS)}, but is {clause['color']!r}"
        )
    if 'position' in clause:
        position = clause['position']
        if not isinstance(position, (list, tuple)) or len(position) != 2:
            raise UsageError(
                f"'position' of {where} must be [relation, index of an earlier clause], but is "
                f'{position!r}'
            )
        wanted, target = position
        if wanted not in RELATIONS:
            raise UsageError(
                f"'position' of {where} must be one of {', '.join(RELATIONS)}, but is {wanted!r}"
            )
        if not _whole(target) or not 0 <= target < index:
            raise UsageError(
                f"'position' of {where} must refer to an earlier include clause by its index, but"
                f' refers to {target!r}'
            )


def check_row(row: dict) -> None:
    """As :func:`check_clauses`, and the prompt, and that GenEval knows the classes.

    Raises:
        UsageError: Names the key that is missing, or the one with a bad value.
    """
    check_clauses(row)
    if 'prompt' not in row:
        raise UsageError(f"'prompt' is missing in {row}; add it")
    for key in ('tag', 'prompt'):
        if not isinstance(row[key], str):
            raise UsageError(f'{key!r} must be a text, but is {row[key]!r}')
    # sheets of pictures are files of this name
    if not re.fullmatch(r'[\w-]+', row['tag']):
        raise UsageError(
            f"'tag' must be letters, digits, _ and - alone, but is {row['tag'][:80]!r}; rename it"
        )
    for key in ('include', 'exclude'):
        for index, clause in enumerate(row.get(key, [])):
            if clause['class'] not in OBJECT_NAMES:
                raise UsageError(
                    f"'class' of {key}[{index}] must be one of GenEval's 80 object names, but is "
                    f'{clause["class"]!r}; see OBJECT_NAMES of'
                    ' mmfgm.evaluation.geneval.judging.prompts'
                )


def read_metadata(path: str | Path) -> list[dict]:
    """Rows of a prompt file: one JSON object a line, with ``tag``, ``include``, optionally
    ``exclude``, and ``prompt``.

    Blank lines are skipped.

    Raises:
        UsageError: If the file cannot be read or has no rows; names file and line if a line is not
            JSON, lacks a key or has a class, colour, relation, count or target that GenEval does
            not know.
    """
    lines = read_text(str(path), "name a file of GenEval's prompts").split('\n')
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
            check_row(rows[-1])
        except UsageError as error:
            raise UsageError(f'{path}, line {number}: {error}') from None
        except ValueError as error:
            raise UsageError(f'{path}, line {number}: not a JSON object: {error}') from error
    if not rows:
        raise UsageError(f'{path} has no GenEval prompts; expected one JSON object a line')
    return rows
