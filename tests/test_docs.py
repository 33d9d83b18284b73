# Copyright (c) mmfgm authors.
"""The commands of README.md, docs/ and configs/*/README.md, as they are written there.

Each command of a ```bash block has an entry in :mod:`tests.docs_commands`; one without, or an entry
that no page has, fails. ``Run`` is run by bash in a folder like a clone, ``small`` after it where
it would take long (docs/extend.md lists these settings), on tiny stand-ins of what would be
downloaded. ``Parse`` is only parsed, because it needs a network, GPUs, Slurm or data that a test
cannot have: the script is there, its tool takes the arguments, and the config is sound and its
    network builds. These are installations, what runs on 8 processes, Slurm, CIFAR-10, and
    GenEval's detector.
"""

import ast
import configparser
import importlib
import os
import re
import shlex
import subprocess
import sys
import urllib.request

import pytest
import torch
from mmengine.registry import DefaultScope

from mmfgm.apis.config import read_config
from mmfgm.engine.runner import check_config
from mmfgm.registry import MODELS
from mmfgm.tools.cli import load_config
from tests.browser import free_port
from tests.conftest import LIMIT, ROOT, tool_env
from tests.docs_commands import COMMANDS, TRAIN, Parse, Run, Serve, sd3_inputs

PAGES = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'SECURITY.md',
    *sorted((ROOT / 'docs').glob('*.md')),
    *sorted((ROOT / 'configs').rglob('README.md')),
]
TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py'))


def blocks(path, language):
    return re.findall(
        rf'^```{language}\n(.*?)^```$', path.read_text(), flags=re.MULTILINE | re.DOTALL
    )


def commands_of(path):
    """Commands of a page, continued lines joined, without comments."""
    for block in blocks(path, 'bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            words = re.sub(r'(^|\s)#\s.*$', '', line)
            if words.strip():
                yield ' '.join(words.split())


def python_files():
    """Files that docs/extend.md shows: name to text."""
    shown = [
        block for block in blocks(ROOT / 'docs/extend.md', 'python') if block.startswith('# my_')
    ]
    return {block.splitlines()[0][2:]: block for block in shown}


def of_kind(kind):
    return [command for command, entry in COMMANDS.items() if isinstance(entry, kind)]


class Sandbox:
    """A folder like a clone in which commands are run, each once, after those it needs."""

    def __init__(self, folder):
        self.folder, self.done = folder, {}
        for name in ('configs', 'tools', 'requirements', 'setup.cfg'):
            (folder / name).symlink_to(ROOT / name)
        (folder / 'docs').mkdir()  # of its own, for a command writes into it
        for name, text in python_files().items():
            (folder / name).write_text(text)
        path = f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'
        self.env = tool_env(PATH=path, PYTHON=sys.executable, PORT=str(free_port()))

    def prepare(self, needs):
        for need in needs:
            if callable(need) and need not in self.done:
                self.done[need] = need(self.folder)
            elif not callable(need):
                self.run(need)

    def run(self, command):
        if command not in self.done:
            entry = COMMANDS[command]
            self.prepare(entry.needs)
            result = subprocess.run(
                ['bash', '-c', f'{command} {entry.small}'],
                cwd=self.folder,
                env=self.env,
                timeout=LIMIT,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, (
                f'{command} {entry.small}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}'
            )
            assert (self.folder / entry.makes).exists(), f'{command} left no {entry.makes}'
            self.done[command] = result.stdout

    def serve(self, command):
        """Start it, open the page that it names, stop it."""
        self.prepare(COMMANDS[command].needs)
        server = subprocess.Popen(
            ['bash', '-c', f'exec {command}'],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            lines = []
            for line in server.stdout:
                lines.append(line)
                if url := re.search(r'http://[\d.:]+', line):
                    assert b'gradio' in urllib.request.urlopen(url.group(0), timeout=LIMIT).read()
                    return
            pytest.fail(f'{command} named no page:\n{"".join(lines)[-3000:]}')
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope='module')
def sandbox(tmp_path_factory):
    (folder := tmp_path_factory.mktemp('docs') / 'my_project').mkdir()
    return Sandbox(folder)


def test_every_command_has_an_entry_and_every_entry_a_page():
    written = {command for page in PAGES for command in commands_of(page)}
    assert not written - set(COMMANDS), 'add them to tests/docs_commands.py'
    assert not set(COMMANDS) - written, (
        'no page has these any more; take them out of tests/docs_commands.py'
    )


def test_small_settings_are_documented():
    page = (ROOT / 'docs/extend.md').read_text()
    for entry in COMMANDS.values():
        assert isinstance(entry, Parse) or not entry.small or f'`{entry.small}`' in page, (
            entry.small
        )


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', page.read_text()):
            other = page.parent / target if target else page
            assert other.exists(), f'{page}: {target}'
            headings = (
                re.findall(r'^#+ (.*)$', other.read_text(), flags=re.MULTILINE) if anchor else []
            )
            slugs = [
                re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings
            ]
            assert not anchor or anchor in slugs, f'{page}: {target}#{anchor}'


@pytest.mark.slow
@pytest.mark.parametrize('command', of_kind(Run), ids=lambda c: c[:90])
def test_command_runs(command, sandbox):
    (sandbox.serve if isinstance(COMMANDS[command], Serve) else sandbox.run)(command)


def arguments(command):
    """Of a command that starts one of our tools, directly or by a script: name of the tool and its
    arguments."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r'[A-Z]+=\w+', word)]
    if words[0] == 'python':
        return words[1].removeprefix('tools/').removesuffix('.py'), words[2:]
    name = words[0].removeprefix('tools/').removesuffix('.sh')
    slurm = [*words[3:4], '--work-dir', *words[4:5], '--launcher', 'slurm', '--resume', *words[5:]]
    return dict(
        dist_train=('train', [words[1], '--launcher', 'pytorch', *words[3:]]),
        dist_geneval=('geneval', [*words[2:], '--launcher', 'pytorch']),
        slurm_train=('train', slurm),
    )[name]


@pytest.mark.parametrize('command', of_kind(Parse), ids=lambda c: c[:90])
def test_command_parses(command, sandbox, monkeypatch, tmp_path):
    monkeypatch.chdir(sandbox.folder)
    monkeypatch.setenv('LOCAL_RANK', '0')
    words = shlex.split(command)
    for script in [word for word in words if word.endswith('.sh')]:
        subprocess.run(['bash', '-n', script], check=True)
        assert os.access(script, os.X_OK)
    if words[0] == 'pip':
        setup = configparser.ConfigParser()
        setup.read('setup.cfg')
        wanted = re.search(r'\[(.*)\]', words[3])
        assert os.path.isfile(words[5])
        assert not wanted or set(wanted.group(1).split(',')) <= set(setup['options.extras_require'])
    elif words[0] != 'bash':
        tool, argv = arguments(command)
        if 'slurm' in command:
            (tmp_path / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
            (tmp_path / 'srun').chmod(0o755)
            started = subprocess.run(
                ['bash', '-c', command],
                env={**sandbox.env, 'PATH': f'{tmp_path}:{sandbox.env["PATH"]}'},
                check=True,
                capture_output=True,
                text=True,
            ).stdout.splitlines()
            assert '--ntasks=16' in started and started[started.index('-u') + 2 :] == argv
        args = importlib.import_module(f'mmfgm.tools.{tool}').parse_args(argv)
        if tool in ('train', 'test'):
            cfg = load_config(args)
            check_config(cfg)
            if 'pretrained' in cfg.model.network:
                sandbox.prepare([sd3_inputs])
                cfg.model.network.latent_size = 8
            with DefaultScope.overwrite_default_scope('mmfgm'), torch.device('meta'):
                MODELS.build(cfg.model.network)
        elif 'config' in args:
            read_config(args.config)


@pytest.mark.slow
def test_python_of_the_readme(sandbox):
    sandbox.run(TRAIN)
    for block in blocks(ROOT / 'README.md', 'python'):
        subprocess.run(
            [sys.executable, '-c', block], cwd=sandbox.folder, env=sandbox.env, check=True
        )


@pytest.mark.parametrize('tool', TOOLS)
def test_help(tool, capsys):
    module = importlib.import_module(f'mmfgm.tools.{tool}')
    wrapper = ast.parse((ROOT / f'tools/{tool}.py').read_text()).body[0]
    assert wrapper.module == module.__name__ and wrapper.names[0].name == 'main'
    with pytest.raises(SystemExit) as stop:
        module.parse_args(['--help'])
    assert stop.value.code == 0 and 'usage:' in capsys.readouterr().out
    setup = (ROOT / 'setup.cfg').read_text()
    assert f'mmfgm-{tool.replace("_", "-")} = mmfgm.tools.{tool}:main' in setup
