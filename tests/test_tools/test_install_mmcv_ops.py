# Copyright (c) mmfgm authors.
"""The script that builds mmcv's ops, with an interpreter that only pretends; and the real one where
they are there."""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import LIMIT, ROOT

# remembers in its folder what was installed and built; fails to build while a file "broken" is
# there
PYTHON = r"""#!/usr/bin/env bash
here="$(dirname "$0")"
case "$*" in
  *"import sys, torch, mmcv.ops"*) [ -e "$here/ops" ] ;;
  *importlib.metadata*) echo "1.0 mmcv1.0-torch$(cat "$here/torch") " ;;
  *" download --no-cache-dir "*) mkdir onedl_mmcv-1.0 &&
    echo "cxx = ['-std=c++17']" > onedl_mmcv-1.0/setup.py &&
    tar -czf onedl_mmcv-1.0.tar.gz onedl_mmcv-1.0 && rm -r onedl_mmcv-1.0 ;;
  *" wheel --no-cache-dir "*)
    echo "$CFLAGS $MMCV_WITH_OPS $(cat setup.py)" >> "$here/built"
    [ ! -e "$here/slow" ] || sleep 3600
    [ ! -e "$here/broken" ] || { echo 'fatal error: no such header'; exit 1; }
    while [ "$1" != --wheel-dir ]; do shift; done
    echo wheel > "$2/onedl_mmcv-1.0.whl" ;;
  *"pip"*" install "*.whl) grep -q wheel "${@: -1}" && touch "$here/ops" ;;
esac
"""


class Machine:
    """A cache and interpreters in a folder."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / 'cache'
        self.env = {**os.environ, 'XDG_CACHE_HOME': str(self.cache)}
        for name in ('VIRTUAL_ENV', 'CONDA_PREFIX'):
            self.env.pop(name, None)

    def interpreter(self, name, torch='2.0'):
        python = self.folder / name / 'python'
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        (python.parent / 'torch').write_text(torch)
        return python

    def command(self, *python):
        return ['bash', ROOT / 'tools/install_mmcv_ops.sh', *python]

    def run(self, *python):
        return subprocess.run(
            self.command(*python),
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def files(self):
        return sorted(
            path.name for path in self.cache.rglob('*') if path.is_file() and path.name != 'lock'
        )


def builds(python):
    built = python.parent / 'built'
    return built.read_text().splitlines() if built.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_built_once_for_a_version_of_torch(machine):
    first, same, other = (
        machine.interpreter('first'),
        machine.interpreter('same'),
        machine.interpreter('other', '2.1'),
    )
    for python in (first, first, same, other):
        result = machine.run(python)
        assert result.returncode == 0 and (python.parent / 'ops').exists(), result.stderr
    # mmcv's own C++ standard is gone
    assert (
        builds(first) == ['-g0 -O1 1 cxx = []'] and builds(same) == [] and len(builds(other)) == 1
    )
    assert machine.files() == ['onedl_mmcv-1.0.whl'] * 2


def test_the_active_environment_comes_first(machine):
    """Then the project's own, then what the path has; one that is named comes before all, and each
    is told."""
    conda, own, venv, named, path = (
        machine.interpreter(f'{name}/bin') for name in ('conda', '.venv', 'venv', 'named', 'path')
    )
    for change, args, python in (
        (dict(PATH=f'{path.parent}:{machine.env["PATH"]}'), (), own),
        (dict(CONDA_PREFIX=conda.parent.parent), (), conda),
        (dict(VIRTUAL_ENV=venv.parent.parent), (), venv),
        ({}, (named,), named),
    ):
        machine.env.update({name: str(value) for name, value in change.items()})
        result = machine.run(*args)
        assert (
            result.returncode == 0
            and result.stdout.splitlines()[0] == f'the interpreter is {python}'
        ), result.stderr
        assert (python.parent / 'ops').exists()
    own.unlink()
    for name in ('VIRTUAL_ENV', 'CONDA_PREFIX'):
        del machine.env[name]
    assert (
        machine.run().stdout.splitlines()[0] == f'the interpreter is {path}'
        and (path.parent / 'ops').exists()
    )


def test_failed_or_interrupted_build_leaves_nothing(machine):
    python = machine.interpreter('python')
    (python.parent / 'broken').touch()
    result = machine.run(python)
    assert (
        result.returncode == 1
        and 'no such header' in result.stderr
        and 'could not be built' in result.stderr
    )
    assert machine.files() == [] and not (python.parent / 'ops').exists()
    (python.parent / 'broken').rename(python.parent / 'slow')
    process = subprocess.Popen(
        machine.command(python), env=machine.env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while len(builds(python)) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, 15)
    assert process.wait(timeout=LIMIT) == 130
    assert machine.files() == [] and not (python.parent / 'ops').exists()
    (python.parent / 'slow').unlink()
    assert machine.run(python).returncode == 0 and (python.parent / 'ops').exists()


def test_interpreter_without_torch(machine):
    python = machine.interpreter('python')
    python.write_text('#!/usr/bin/env bash\nexit 1\n')
    result = machine.run(python)
    assert result.returncode == 2 and "pip install 'mmfgm[geneval]'" in result.stderr


def test_nothing_is_done_where_the_ops_work(machine):
    pytest.importorskip('mmcv.ops', reason='run tools/install_mmcv_ops.sh')
    result = machine.run(sys.executable)
    assert result.returncode == 0 and 'the ops of mmcv work with torch 2' in result.stdout
    assert not machine.cache.exists()
