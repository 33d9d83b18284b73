# Copyright (c) mmfgm authors.
"""Commands answer at once: parsing arguments imports nothing that takes long."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, tool_env

HEAVY = ('torch', 'mmengine', 'numpy', 'PIL', 'safetensors', 'matplotlib')
TOOLS = [*sorted(path.stem for path in (ROOT / 'tools').glob('*.py')), 'quickstart']
SHOW = f'print("HEAVY", [name for name in {HEAVY} if name in sys.modules])'


def python(code, **kwargs):
    return subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        env=tool_env(),
        capture_output=True,
        text=True,
        check=True,
        **kwargs,
    ).stdout


@pytest.mark.parametrize('argv', [['--help'], ['--misspelt']])
@pytest.mark.parametrize('tool', TOOLS)
def test_parsing_imports_nothing_that_takes_long(tool, argv):
    code = f"""
import sys
from mmfgm.tools.{tool} import main
code = 0
try:
    main({argv})
except SystemExit as e:
    code = e.code
print('EXIT', code)
{SHOW}
"""
    out = python(code)
    assert out.endswith(f'EXIT {0 if argv == ["--help"] else 2}\nHEAVY []\n')


CONFIG = "Config.fromfile('base.py').model.type"


@pytest.mark.parametrize(
    'imports',
    [
        'import mmfgm; from mmengine.config import Config',
        'from mmengine.config import Config; import mmfgm',
        'from mmengine.config import Config',
    ],
)
def test_configs_are_found_whichever_package_is_imported_first(imports, tmp_path):
    base = "'mmfgm::fgm/digits.py'"
    if 'mmfgm' not in imports:  # a project's config that brings mmfgm along
        base = f"__import__('mmfgm') and {base}"
    (tmp_path / 'base.py').write_text(f'_base_ = {base}\n')
    code = f'{imports}; import os; os.chdir({str(tmp_path)!r}); print({CONFIG})'
    assert python(code) == 'FGM\n'


def test_the_package_waits_for_mmengine():
    """Importing mmfgm imports nothing heavy, and its finders are gone once MMEngine is
    there."""
    out = python(
        f'import sys, mmfgm; {SHOW}; import mmengine.config, mmengine.optim; '
        "print([f for f in sys.meta_path if type(f).__module__ == 'mmfgm'])"
    )
    assert out == 'HEAVY []\n[]\n'


def test_judging_needs_no_network():
    """What GenEval asks and how it decides can be used where there is no torch."""
    out = python(
        'import sys; from mmfgm.evaluation.geneval.judging import generate; '
        "print(len(generate()), 'torch' in sys.modules, 'mmengine' in sys.modules)"
    )
    assert out == '553 False False\n'


@pytest.mark.parametrize('first', ['mmfgm.apis.training', 'mmengine.runner', 'mmfgm.registry'])
def test_a_training_does_not_import_transformers(first):
    assert 'None []' in python(f"""
import sys, mmfgm, {first}, mmfgm.apis.training
print(sys.modules.get('transformers'), [name for name in ('peft',) if name in sys.modules])
""")
