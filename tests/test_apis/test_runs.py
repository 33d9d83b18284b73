# Copyright (c) mmfgm authors.
"""A work dir that stands for the config of its run and for its last checkpoint."""

import shutil
import subprocess
import sys

import pytest
import torch

from mmfgm.apis import FGMInferencer, read_config
from mmfgm.apis.schema import check_run_config
from mmfgm.errors import UsageError
from mmfgm.models import read_state_dict
from mmfgm.tools.export_diffusers import export_diffusers
from mmfgm.tools.export_diffusers import parse_args as parse_export
from mmfgm.tools.generate import generate
from mmfgm.tools.test import test as measure
from tests.conftest import ROOT


def write_start(run, cfg, name='20260101_000000', scalars='{"step": 1, "loss": 0.5}\n'):
    """What a start of a training leaves of its config."""
    folder = run / name / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'config.py').write_text(cfg.pretty_text)
    (folder / 'scalars.json').write_text(scalars)
    return folder / 'config.py'


@pytest.fixture
def run(digits, tmp_path):
    """As the quickstart leaves them: a run, and its teacher beside it; named from elsewhere."""
    run = tmp_path / 'quickstart' / 'fgm'
    before = 'work_dirs/quickstart'
    cfg = read_config(digits.config)
    cfg.merge_from_dict(
        {
            'model.teacher.checkpoint': f'{before}/teacher/iter_1.pth',
            'work_dir': f'{before}/fgm',
            'resume': True,
            'evaluations.fd.dataset.num_samples': 20,
        }
    )
    write_start(run, cfg)
    # a start that was refused before it logged anything, with another config
    write_start(run, read_config('mmfgm::fgm/toy2d_8gaussians.py'), '20260102_000000', '')
    (run.parent / 'teacher').mkdir()
    shutil.copy(digits.folder / 'teacher.pth', run.parent / 'teacher' / 'iter_1.pth')
    shutil.copy(digits.weights, run / 'iter_1.pth')
    (run / 'last_checkpoint').write_text('iter_1.pth')
    return run


def test_images_are_those_of_config_and_work_dir(digits, run):
    alone, both = FGMInferencer(str(run)), FGMInferencer(digits.config, str(run))
    assert alone.networks == both.networks == ['generator_ema', 'generator', 'teacher']
    for sampling in (dict(), dict(network='teacher', nfe=2)):
        ours, theirs = (
            torch.stack(each([3, 1], out='tensor', **sampling)['predictions'])
            for each in (alone, both)
        )
        assert torch.equal(ours, theirs)


def test_the_config_is_that_of_the_last_start_that_logged(run):
    cfg = read_config(str(run), {'model.network.depth': 3})
    assert (cfg.model.network.type, cfg.model.network.depth) == ('AdaLNMLP', 3)
    assert cfg.work_dir == str(run) and 'resume' not in cfg


def test_tools_take_a_work_dir_alone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate([str(run), '--labels', '3', '--compare', '2', '--out', 'images'])
    assert (tmp_path / 'images' / 'compare.png').is_file()
    # as an option may stand anywhere
    export_diffusers([str(run), '--network', 'generator', 'export'])
    exported = read_state_dict('export/generator.safetensors')
    trained = read_state_dict(str(run), network='generator')
    assert exported and all(torch.equal(value, trained[key]) for key, value in exported.items())
    table = measure([str(run), '--network', 'teacher', 'generator_ema', '--nfe', '2'])
    assert set(table['fd/fd']) == {'teacher', 'generator_ema'}
    # beside the run, wherever it was trained
    assert (run / 'test' / 'metrics.json').is_file()
    assert not (tmp_path / 'work_dirs').exists()


def test_arguments_of_the_export():
    for argv in ('C K O --force', 'C --force K O', 'C K --force O'):
        args = parse_export(argv.split())
        assert (args.config, args.checkpoint, args.out, args.force) == ('C', 'K', 'O', True)
    args = parse_export(['W', 'O'])
    assert (args.config, args.checkpoint, args.out) == ('W', None, 'O')
    with pytest.raises(UsageError, match='give CONFIG CHECKPOINT OUT, or WORK_DIR OUT'):
        export_diffusers(['mmfgm::fgm/digits.py', 'out'])


@pytest.mark.parametrize(
    'args, passed',
    [
        (('RUN', '2'), ['RUN']),
        (('RUN', '2', '--nfe', '5'), ['RUN', '--nfe', '5']),
        (('config.py', 'RUN', '2', '--nfe', '5'), ['config.py', 'RUN', '--nfe', '5']),
    ],
)
def test_dist_test_takes_a_work_dir_alone(tmp_path, args, passed):
    (tmp_path / 'python').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    args = [str(tmp_path) if word == 'RUN' else word for word in args]
    passed = [str(tmp_path) if word == 'RUN' else word for word in passed]
    result = subprocess.run(
        ['bash', ROOT / 'tools/dist_test.sh', *args],
        env={'PATH': '/usr/bin:/bin', 'PYTHON': str(tmp_path / 'python')},
        capture_output=True,
        text=True,
    )
    words = [word for word in result.stdout.splitlines() if word not in ('--launcher', 'pytorch')]
    assert words[-len(passed) :] == passed and '2' in ' '.join(words), result.stderr


HOSTILE = {
    'a module to import': ("custom_imports = dict(imports=['STRANGER'])", 'no module to import'),
    'a dotted name': ("model = dict(type='os.system')", 'a name that is registered'),
    'a dotted name behind a scope': (
        "model = dict(type='mmfgm.os.system')",
        'a name that is registered',
    ),
    'a known name of another module': (
        "model = dict(type='STRANGER.FGM')",
        'a name that is registered',
    ),
    'the name of a module': ("model = dict(type='STRANGER')", 'a name that is registered'),
    'a dotted solver': (
        "default_hooks = dict(samples=dict(samplings=dict(a=dict(solver='STRANGER.run'))))",
        'a name that is registered',
    ),
    'another scope': ("default_scope = 'STRANGER'", 'one of'),
    'a pickle with code': (
        "model = dict(teacher=dict(checkpoint='a.pth', weights_only=False))",
        'to be True',
    ),
    'a program': ("metric = dict(detector=dict(config='evil.py'))", 'no Python file'),
    'weights of its own': ("model = dict(init_cfg=dict(checkpoint='a.pth'))", 'left out'),
    'code of the hub': ('pipeline = dict(trust_remote_code=True)', 'left out'),
}


@pytest.mark.parametrize('attack, said', HOSTILE.values(), ids=HOSTILE)
def test_a_work_dir_from_a_stranger_runs_nothing(attack, said, run, monkeypatch):
    """Any of these would run or import something where the config is a program."""
    (run / 'stranger.py').write_text("open('ran', 'w').close()")
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    dump = run / '20260101_000000' / 'vis_data' / 'config.py'
    dump.write_text(f'{dump.read_text()}\n{attack.replace("STRANGER", "stranger")}\n')
    with pytest.raises(UsageError, match='give its config before the work dir') as error:
        FGMInferencer(str(run))
    assert said in str(error.value)
    assert not (run / 'ran').exists() and 'stranger' not in sys.modules


def test_configs_of_ours_may_stand_in_a_work_dir():
    """All that they name is registered, and none needs code."""
    names = [*ROOT.glob('configs/fgm/*.py'), *ROOT.glob('configs/reflow/*.py')]
    assert len(names) > 30
    for name in names:
        check_run_config(read_config(str(name)), str(name))


def test_what_is_no_work_dir_says_what_is(run):
    with pytest.raises(UsageError, match=f'it holds {run}: name one of them'):
        FGMInferencer(str(run.parent))
    (run / '20260101_000000' / 'vis_data' / 'config.py').unlink()
    with pytest.raises(UsageError, match='name the work dir of a run'):
        FGMInferencer(str(run))
