# Copyright (c) mmfgm authors.
"""docs/architecture.md names only what exists."""

import ast
import re

from tests.conftest import ROOT

PAGE = ROOT / 'docs/architecture.md'
CODE = re.compile(r'`([^`\n]+)`')
# a path with a folder or an ending, and after a colon a name in a file
PLACE = re.compile(
    r'([a-z.][\w.-]*/(?:[\w.-]+/?)*|\w+\.(?:py|sh|md|yml|cfg))'  # the path
    r'(?::([A-Za-z_][\w.]*))?'  # the name
)


def places():
    """Paths that the page names, with the dotted name in the file or None."""
    for text in CODE.findall(PAGE.read_text()):
        for word in text.split():
            if match := PLACE.fullmatch(word):
                yield match.groups()


def find(path):
    """The file or folder, from the root or below mmfgm/, or None."""
    found = [folder / path for folder in (ROOT, ROOT / 'mmfgm') if (folder / path).exists()]
    return found[-1] if found else None


def defines(path, name):
    """Whether a file defines a dotted name: a function, class, attribute or something inherited."""
    body = ast.parse(path.read_text()).body
    for part in name.split('.'):
        for node in body:
            targets = getattr(node, 'targets', [getattr(node, 'target', None)])
            names = [getattr(node, 'name', None), *(getattr(t, 'id', None) for t in targets)]
            if part in names:
                body = getattr(node, 'body', [])
                break
        else:
            return False
    return True


def test_every_path_and_name_exists():
    seen = list(places())
    assert len([name for _, name in seen if name]) > 50
    for path, name in seen:
        assert (there := find(path)), f'{path} does not exist'
        assert name is None or defines(there, name), f'{path} does not define {name}'


def test_hooks_are_in_the_order_they_run(tmp_path):
    from mmengine.config import Config

    from mmfgm.engine import FlowRunner

    cfg = Config.fromfile(ROOT / 'configs/fgm/digits.py')
    cfg.merge_from_dict({'work_dir': str(tmp_path), 'launcher': 'none'})
    cfg.model.teacher.checkpoint = None
    hooks = [type(hook).__name__ for hook in FlowRunner.from_cfg(cfg).hooks]
    section = PAGE.read_text().split('## Hooks, in the order they run')[1].split('\n## ')[0]
    rows = [line for line in section.splitlines() if re.match(r'\| \d+ \|', line)]
    shown = [name for row in rows for name in re.findall(r'(\w+Hook)\b', row.split('|')[2])]
    assert shown == hooks


def test_the_floors_are_those_of_the_package():
    from tests.test_package import LAYERS

    section = PAGE.read_text().split('## Eight floors')[1].split('\n## ')[0]
    rows = [line.split('|')[1] for line in section.splitlines() if line.startswith('| ')]
    shown = [name.strip('/').removesuffix('.py') for row in rows for name in CODE.findall(row)]
    assert len(rows) == 2 + 8 and set(LAYERS) - set(shown) <= {'version'}
    order = [LAYERS.index(name) for name in shown if name in LAYERS and '.' not in name]
    upper = [level for level in order if level >= LAYERS.index('flow')]
    assert upper == sorted(upper)
