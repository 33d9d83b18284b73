# Copyright (c) mmfgm authors.
"""Promises about the package as a whole."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
import yaml

from mmfgm.apis import read_config
from tests.conftest import ROOT

# a file may import from its own layer and from those before it
LAYERS = [
    'errors',
    'version',
    'lazy',
    'files',
    'locks',
    'config',
    'processes',
    'registry',
    'flow',
    'datasets',
    'models',
    'evaluation',
    'engine',
    'caches',
    'apis',
    'tools',
]


def imports_of(path):
    """Names below mmfgm that a file imports, whatever the spelling."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.split('.')[1] for alias in node.names if alias.name.startswith('mmfgm.')
            )
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*base, *(node.module or '').split('.')]
            if parts[0] == 'mmfgm' and len(parts) > 1 and parts[1]:
                yield parts[1]
            elif parts[0] == 'mmfgm':  # from mmfgm import engine, from .. import engine
                yield from (alias.name for alias in node.names if alias.name in LAYERS)


def test_imports_go_one_way():
    seen = 0
    for path in (ROOT / 'mmfgm').rglob('*.py'):
        parts = path.relative_to(ROOT / 'mmfgm').parts
        layer = parts[0].removesuffix('.py')
        if '.mim' in parts or layer == '__init__':
            continue
        for imported in imports_of(path):
            seen += 1
            assert LAYERS.index(imported) <= LAYERS.index(layer), f'{path} imports mmfgm.{imported}'
    assert seen > 50


def test_flow_is_pure_torch():
    code = (
        "import sys, types; sys.modules['mmfgm'] = types.ModuleType('mmfgm'); "
        f"sys.modules['mmfgm'].__path__ = [{str(ROOT / 'mmfgm')!r}]; import mmfgm.flow; "
        "print(any(name.split('.')[0] == 'mmengine' for name in sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == 'False'
    )


def configs_of(*folders):
    return sorted(
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / 'configs' / folder).glob('*.py')
    )


CONFIGS = configs_of('reflow', 'fgm')


def check_listed(path):
    metafile = yaml.safe_load((ROOT / path).with_name('metafile.yml').read_text())
    assert path in [model['Config'] for model in metafile['Models']]
    assert (
        path.split('/')[-1].removesuffix('.py') in (ROOT / path).with_name('README.md').read_text()
    )


@pytest.mark.parametrize('path', CONFIGS)
def test_configs_parse_and_are_listed(path):
    cfg = read_config(str(ROOT / path))
    assert cfg.model.type in ('FlowMatching', 'ConsistencyFM', 'FGM') and cfg.get('evaluations')
    check_listed(path)


@pytest.mark.parametrize('path', configs_of('geneval'))
def test_geneval_configs_parse_and_are_listed(path):
    cfg = read_config(str(ROOT / path))
    assert (
        cfg.pipeline.type == 'DiffusersPipeline'
        and cfg.evaluations.geneval.metrics.geneval.type == 'GenEval'
    )
    check_listed(path)


def test_fgm_configs_share_the_teachers_network():
    """Of configs that distil a teacher of ours; dropout is no part of the weights."""
    shared = 0
    for path in CONFIGS:
        fgm = read_config(str(ROOT / path))
        checkpoint = fgm.model.get('teacher', {}).get('checkpoint') or ''
        if checkpoint.startswith('work_dirs/reflow/'):
            teacher = read_config(str(ROOT / f'configs/reflow/{checkpoint.split("/")[-1]}.py'))
            for network in (fgm.model.network, teacher.model.network):
                network.get('unet', {}).pop('dropout', None)
            assert fgm.model.network == teacher.model.network
            # 3-ReFlow learns from 2-ReFlow
            name = checkpoint.split('/')[-1].removesuffix('_2reflow')
            assert path.split('/')[-1].startswith(name)
            shared += 1
    assert shared >= 9


def test_every_file_has_its_header():
    for path in [*(ROOT / 'mmfgm').rglob('*.py'), *(ROOT / 'tests').rglob('*.py')]:
        text = path.read_text()
        assert not text or text.startswith('# Copyright (c) mmfgm authors.'), path


def test_readme_names_files_that_exist():
    for readme in [ROOT / 'README.md', *(ROOT / 'configs').rglob('README.md')]:
        for target in re.findall(r'\]\((?!http|#)([^)#]+)\)', readme.read_text()):
            assert (readme.parent / target).exists(), f'{readme}: {target}'


# modules of the ground floor are faces themselves
GROUND = {'errors', 'files', 'locks', 'processes', 'registry', 'version', 'lazy', 'config'}


def imports_across(path):
    """``(line, module, name)`` of each name that a file imports from another folder of mmfgm."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*base, *(node.module.split('.') if node.module else [])]
            here = package[1] if len(package) > 1 else None
            if parts[0] == 'mmfgm' and len(parts) > 1 and parts[1] not in {*GROUND, here}:
                for alias in node.names:
                    yield node.lineno, '.'.join(parts), alias.name


def test_folders_know_only_the_faces_of_others():
    """What another folder offers stands in the ``__all__`` of a package; the rest may change."""
    seen = 0
    for path in (ROOT / 'mmfgm').rglob('*.py'):
        if '.mim' in path.parts:
            continue
        for line, module, name in imports_across(path):
            seen += 1
            where = f'{path.relative_to(ROOT)}:{line} imports {name} from {module}'
            face = ROOT.joinpath(*module.split('.'), '__init__.py')
            assert face.exists(), f'{where}, which is a file, not the face of a folder'
            assert name in importlib.import_module(module).__all__, f'{where}, which hides it'
    assert seen > 100


def message_of(node):
    """The text of a message, with {} for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return ''.join(map(message_of, node.values))
    if isinstance(node, ast.BinOp):
        return message_of(node.left) + message_of(node.right)
    if isinstance(node, ast.IfExp):
        return f'{message_of(node.body)} {message_of(node.orelse)}'
    return '{}'


def usage_errors():
    for path in sorted((ROOT / 'mmfgm').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())) if '.mim' not in path.parts else ():
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if getattr(node.exc.func, 'id', '') == 'UsageError' and node.exc.args:
                    yield f'{path.relative_to(ROOT)}:{node.lineno}', message_of(node.exc.args[0])


def test_errors_say_what_to_do():
    """What can be checked of "expected A, found B; do C": the fix, and plain English."""
    messages = dict(usage_errors())
    assert len(messages) > 300
    for place, text in messages.items():
        if set(text) <= set('{} '):  # all of it is made elsewhere
            continue
        assert not re.search(r'expected (is|are)\b|\bis no text\b|\bare no pictures\b', text), (
            f'{place}: {text!r} is not English; write "expected A, found B"'
        )
        verbs = (
            'expected|must|use|set|give|name|choose|raise|make|delete|need|needs|fill|take|cannot'
        )
        assert re.search(rf'[;:]|\.\s|\b({verbs})\b', text), f'{place}: {text!r} names no fix'
