# Copyright (c) mmfgm authors.
"""The tools as a user runs them."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from mmfgm.apis import is_export
from mmfgm.apis.testing import folder_name
from mmfgm.errors import UsageError
from mmfgm.models import Sampling
from mmfgm.tools.merge_checkpoint import merge
from mmfgm.tools.quickstart import quickstart
from mmfgm.tools.test import test as measure_tool
from mmfgm.tools.train import train as train_tool
from tests.conftest import ROOT, run_module, tool_env, train


@pytest.fixture(scope='module')
def run(tiny, tmp_path_factory):
    """A finished tiny FGM run."""
    work_dir = tmp_path_factory.mktemp('run')
    train(
        tiny / 'fgm.py',
        work_dir,
        'default_hooks.checkpoint.save_best=fd/fd',
        'default_hooks.checkpoint.max_keep_ckpts=2',
        'default_hooks.samples.interval=4',
    )
    return work_dir


@pytest.mark.slow
def test_a_run_leaves_what_a_user_expects(run):
    log = next(run.glob('*/*.log')).read_text()
    lines = [line for line in log.splitlines() if 'Iter(train)' in line]
    assert len(lines) == 8
    for word in (
        'eta:',
        'online.lr',
        'generator.lr',
        'online/loss_fm',
        'online/grad_norm',
        'online/time_share',
        'generator/loss_fgm',
        'generator/grad_norm',
        'generator/time_share',
        'samples_per_second',
    ):
        assert word in lines[-1], word
    shares = [float(x) for x in re.findall(r'time_share: ([\d.]+)', lines[-1])]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    values = [
        json.loads(line)
        for line in next(run.glob('*/vis_data/scalars.json')).read_text().splitlines()
    ]
    assert [v['step'] for v in values if 'fd/fd' in v] == [4, 8]
    assert len(list(run.glob('*/vis_data/events*'))) == 1
    assert sorted(p.name for p in run.glob('*/vis_data/vis_image/*.png')) == [
        'samples_4.png',
        'samples_8.png',
    ]
    assert sorted(p.name for p in run.glob('iter_*.pth')) == ['iter_6.pth', 'iter_8.pth']
    assert len(list(run.glob('best_fd_fd_iter_*.pth'))) == 1 and not list(run.glob('*.tmp'))


@pytest.mark.slow
def test_a_file_of_one_network_is_measured(run, tiny, tmp_path):
    merged = str(tmp_path / 'merged.safetensors')
    merge([str(run / 'iter_8.pth'), merged])

    def measure(weights, network='generator_ema'):
        folder = tmp_path / f'{len(list(tmp_path.iterdir()))}'
        argv = [str(tiny / 'fgm.py'), str(weights), '--network', network, '--work-dir', str(folder)]
        return measure_tool(argv)['fd/fd']

    assert measure(merged) == measure(run / 'iter_8.pth')
    with pytest.raises(UsageError, match='holds generator_ema alone, not online; name its ch'):
        measure(merged, 'online')


@pytest.mark.slow
def test_teacher_and_generator_in_one_table(run, tiny, tmp_path):
    out = run_module(
        'mmfgm.tools.test',
        tiny / 'fgm.py',
        run / 'iter_8.pth',
        '--network',
        'teacher',
        'generator_ema',
        '--nfe',
        '2',
        '4',
        '--solver',
        'heun',
        '--out',
        tmp_path,
        '--work-dir',
        tmp_path / 'w',
    ).stdout
    table = json.loads((tmp_path / 'metrics.json').read_text())['fd/fd']
    assert list(table) == ['teacher', 'generator_ema'] and list(table['teacher']) == ['2', '4']
    assert list(table['generator_ema']) == ['1']
    for network in table:
        for nfe, value in table[network].items():
            assert re.search(rf'{network} +{nfe} +{value:.4f}', out)
    assert (tmp_path / 'samples.png').exists() and (tmp_path / 'fd_fd_vs_nfe.png').exists()
    # the same number that training logged, and on two processes
    logged = re.findall(r'iteration 8:  fd/fd: ([\d.]+)', next(run.glob('*/*.log')).read_text())
    assert float(logged[0]) == pytest.approx(table['generator_ema']['1'], abs=1e-4)
    run_module(
        'mmfgm.tools.test',
        tiny / 'fgm.py',
        run / 'iter_8.pth',
        '--out',
        tmp_path / 'two',
        '--launcher',
        'pytorch',
        '--work-dir',
        tmp_path / 'w2',
        nproc=2,
    )
    two = json.loads((tmp_path / 'two' / 'metrics.json').read_text())['fd/fd']['generator_ema']['1']
    assert two == pytest.approx(table['generator_ema']['1'], rel=1e-5)


def test_samplings_have_folders_of_their_own():
    samplings = [
        Sampling('generator'),
        Sampling('teacher', 4),
        Sampling('teacher', 4, 'heun'),
        Sampling('teacher', 4, guidance=2.0),
        Sampling('teacher', 4, guidance=7.0),
        Sampling('teacher', 4, 'heun', shift=3.0, guidance=7.0),
    ]
    assert [folder_name(sampling) for sampling in samplings] == [
        'generator_1_nfe',
        'teacher_4_nfe',
        'teacher_4_nfe_solver_heun',
        'teacher_4_nfe_guidance_2.0',
        'teacher_4_nfe_guidance_7.0',
        'teacher_4_nfe_solver_heun_shift_3.0_guidance_7.0',
    ]


@pytest.mark.slow
def test_a_generator_is_tested_without_its_teacher(run, tiny, tmp_path):
    run_module(
        'mmfgm.tools.test',
        tiny / 'fgm.py',
        run / 'iter_8.pth',
        '--work-dir',
        tmp_path,
        '--cfg-options',
        'model.teacher.checkpoint=gone.pth',
    )


def test_profile_shows_the_phases(tiny, tmp_path):
    run = tmp_path / 'run'
    result = run_module(
        'mmfgm.tools.train',
        tiny / 'fgm.py',
        '--work-dir',
        run,
        '--profile',
        '--cfg-options',
        'evaluations=None',
        'default_hooks.samples=None',
        'default_hooks.checkpoint.save_best=None',
    )
    assert 'Self CPU time total' in result.stdout
    events = json.loads((run / 'trace.json').read_text())['traceEvents']
    phases = Counter(e['name'] for e in events if e.get('name', '').endswith(' phase'))
    # of two cycles
    assert phases == {'online phase': 2, 'generator phase': 2}
    for argv, message in [
        (['--resume'], 'leave --resume out'),
        (['--cfg-options', 'train_cfg.max_iters=5'], 'needs 6 iterations'),
    ]:
        with pytest.raises(UsageError, match=message):
            train_tool([str(tiny / 'fgm.py'), '--work-dir', str(run), '--profile', *argv])


@pytest.mark.slow
def test_quickstart_and_again(tmp_path):
    args = (
        '--work-dir',
        tmp_path / 'q',
        '--pretrain-iters',
        20,
        '--distill-iters',
        50,
        '--num-samples',
        200,
    )
    first = run_module('mmfgm.tools.quickstart', *args, cwd=tmp_path)
    text = (tmp_path / 'q' / 'metrics.json').read_text()
    content = json.loads(text)
    assert list(content['seconds']) == ['pretrain', 'distill']
    measured = content['metrics']['fd/fd']
    assert {network: list(values) for network, values in measured.items()} == dict(
        teacher=['1', '10', '50', '100'], generator_ema=['1']
    )
    assert all(value > 0 for part in measured.values() for value in part.values())
    assert re.search(r'generator_ema +1 +[\d.]+', first.stdout)
    for name in ('samples.png', 'curves.png', 'test/fd_fd_vs_nfe.png', 'report.html'):
        assert (tmp_path / 'q' / name).stat().st_size > 5000
    assert is_export(str(tmp_path / 'q' / 'export'))
    again = run_module('mmfgm.tools.quickstart', *args, cwd=tmp_path)
    assert (
        again.stdout.count('finished already') == 2
        and 'Iter(train)' not in again.stdout + again.stderr
    )
    assert (tmp_path / 'q' / 'metrics.json').read_text() == text


@pytest.mark.slow
def test_quickstart_of_shapes_and_again(tmp_path):
    """From the released teacher, which is not trained."""
    args = ('shapes', '--work-dir', tmp_path / 'q', '--distill-iters', 2, '--num-samples', 12)
    first = run_module('mmfgm.tools.quickstart', *args, cwd=tmp_path)
    text = (tmp_path / 'q' / 'metrics.json').read_text()
    content = json.loads(text)
    assert list(content['seconds']) == ['distill']
    tasks = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
    for name in (*tasks, 'overall', 'overall_low', 'overall_high'):
        measured = content['metrics'][f'shapes/score_{name}']
        assert {network: list(values) for network, values in measured.items()} == dict(
            teacher=['50'], generator_ema=['1']
        )
        assert f'shapes/score_{name} ' in first.stdout
    # half of twelve captions: a teacher that is released draws most of them
    assert content['metrics']['shapes/score_overall']['teacher']['50'] >= 0.5
    assert (tmp_path / 'q' / 'samples.png').stat().st_size > 5000
    assert is_export(str(tmp_path / 'q' / 'export'))
    again = run_module('mmfgm.tools.quickstart', *args, cwd=tmp_path)
    assert again.stdout.count('finished already') == 1
    assert 'Iter(train)' not in again.stdout + again.stderr
    assert (tmp_path / 'q' / 'metrics.json').read_text() == text


@pytest.mark.parametrize(
    'argv, message',
    [
        (['digit'], r"there is no quickstart 'digit'; choose from \['digits', 'shapes'\]"),
        (['shapes', '--pretrain-iters', '5'], 'released with mmfgm.*leave --pretrain-iters out'),
    ],
)
def test_quickstart_refuses(argv, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        quickstart([*argv, '--work-dir', str(tmp_path / 'q')])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_downstream_project_with_the_built_wheel(tiny, tmp_path):
    """An empty folder, the wheel installed, a config of two overrides, `python -m
    mmfgm.tools.train`."""
    subprocess.run(
        [
            sys.executable,
            '-m',
            'build',
            '--wheel',
            '--no-isolation',
            '--outdir',
            tmp_path / 'dist',
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    wheel = next((tmp_path / 'dist').glob('mmfgm-*.whl'))
    site, project = tmp_path / 'site', tmp_path / 'project'
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, wheel],
        check=True,
    )
    project.mkdir()
    env = tool_env(PYTHONPATH=str(site))
    (project / 'small.py').write_text(
        "_base_ = __import__('mmfgm') and 'mmfgm::fgm/digits.py'\n"
        'train_cfg = dict(max_iters=2)\n'
        'model = dict(network=dict(width=16, depth=2, embed_dim=16),'
        f' teacher=dict(checkpoint={str(tiny / "teacher_run")!r}))\n'
    )
    where = subprocess.run(
        [sys.executable, '-c', 'import mmfgm; print(mmfgm.__file__)'],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(site))
    # what comes with mmfgm is in the wheel, and configs of other projects name it
    (project / 'fashion.py').write_text("_base_ = 'mmfgm::fgm/fashion.py'\n")
    assets = subprocess.run(
        [
            sys.executable,
            '-c',
            'from mmfgm.apis import read_config; from mmfgm.files import asset_path;'
            "cfg = read_config('fashion.py'); metric = cfg.evaluations.fd.metrics.label;"
            'print(asset_path(metric.feature.weights))',
        ],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert assets.startswith(str(site / 'mmfgm' / '.mim' / 'assets'))
    run_module('mmfgm.tools.train', 'small.py', cwd=project, env=env)
    assert (project / 'work_dirs' / 'project' / 'small' / 'iter_2.pth').exists()
    # the packaged configs themselves, and the console command
    command = [
        str(site / 'bin' / 'mmfgm-train'),
        'mmfgm::reflow/digits.py',
        '--cfg-options',
        'train_cfg.max_iters=1',
        'evaluations.fd.interval=0',
        'default_hooks.samples=None',
    ]
    subprocess.run(
        [sys.executable, *command], cwd=project, env=env, check=True, capture_output=True
    )
    assert (project / 'work_dirs' / 'reflow' / 'digits' / 'iter_1.pth').exists()


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'quickstart.sh', 'run_tests.sh']
)
def test_scripts_parse_and_are_executable(script):
    path = ROOT / 'tools' / script
    subprocess.run(['bash', '-n', path], check=True)
    assert os.access(path, os.X_OK)


@pytest.mark.slow
def test_dist_train(tiny, tmp_path):
    subprocess.run(
        [
            'bash',
            ROOT / 'tools' / 'dist_train.sh',
            tiny / 'fgm.py',
            '2',
            '--work-dir',
            tmp_path,
            '--cfg-options',
            'train_cfg.max_iters=2',
        ],
        check=True,
        env=tool_env(PYTHON=sys.executable),
        capture_output=True,
    )
    assert (tmp_path / 'iter_2.pth').exists()
    subprocess.run(
        [
            'bash',
            ROOT / 'tools' / 'dist_test.sh',
            tiny / 'fgm.py',
            tmp_path / 'iter_2.pth',
            '2',
            '--work-dir',
            tmp_path,
        ],
        check=True,
        env=tool_env(PYTHON=sys.executable),
        capture_output=True,
    )
    assert (tmp_path / 'test' / 'metrics.json').exists()
