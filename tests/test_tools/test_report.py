# Copyright (c) mmfgm authors.
"""The report of a run: what it reads, and what a browser makes of it."""

import json
import re

import pytest
from PIL import Image

import mmfgm
from mmfgm.apis import read_config
from mmfgm.apis.report.curves import group_scalars, over_nfe
from mmfgm.apis.report.data import closest_packaged_config, config_difference, read_run
from mmfgm.errors import UsageError
from mmfgm.tools.report import report
from tests.browser import open_browser
from tests.conftest import ROOT, run_module

RESUMED = 'x - mmengine - INFO - resumed epoch: 0, iter: {}\n'
ENVIRONMENT = (
    '-'
    * 60
    + '\nSystem environment:\n    Python: 3.11\n    PyTorch: 2.14\n    PyTorch compiling details:'
    ' long\n  - and longer: yes\n\nRuntime environment:\n    seed: 0\n' + '-' * 60 + '\n'
)


def start(work_dir, stamp, lines, log='', config='fgm/digits.py', pictures=(), torn=''):
    """One start of a training, as MMEngine leaves it."""
    folder = work_dir / stamp / 'vis_data'
    (folder / 'vis_image').mkdir(parents=True)
    (folder.parent / f'{stamp}.log').write_text(ENVIRONMENT + log)
    (folder / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines) + torn)
    cfg = read_config(str(ROOT / 'configs' / config))
    cfg.merge_from_dict(
        {'train_cfg.max_iters': 40, 'work_dir': 'x', 'param_scheduler.online.0.end_factor': 0.5}
    )
    cfg.dump(folder / 'config.py')
    for step in pictures:
        for name in ('samples', 'geneval_sheet'):
            Image.new('RGB', (4, 4)).save(folder / 'vis_image' / f'{name}_{step}.png')
    return work_dir


def losses(*steps, offset=0.0):
    return [{'online/loss_fm': step + offset, 'iter': step, 'step': step} for step in steps]


def test_a_resumed_start_replaces_what_it_trained_again(tmp_path):
    start(
        tmp_path,
        '20260101_000000',
        [*losses(10, 20, 30), {'fd/fd': 1.0, 'step': 20}],
        pictures=(20, 30),
    )
    start(
        tmp_path,
        '20260101_000100',
        [*losses(30, 40, offset=0.5), {'fd/fd': 2.0, 'step': 20}, {'fd/fd': 3.0, 'step': 40}],
        RESUMED.format(20),
        pictures=(40,),
        torn='{"online/lo',
    )
    run = read_run(str(tmp_path))
    assert run.scalars == {
        'online/loss_fm': {10: 10.0, 20: 20.0, 30: 30.5, 40: 40.5},
        'fd/fd': {20: 2.0, 40: 3.0},
    }
    assert (
        list(run.pictures['samples']) == [20, 40]
        and run.metrics == ['fd/fd']
        and run.last_iteration == 40
    )
    assert run.starts == [('20260101_000000', 0), ('20260101_000100', 20)]
    assert run.environment == {'Python': '3.11', 'PyTorch': '2.14', 'seed': '0'}


def test_a_start_from_the_beginning_replaces_everything(tmp_path):
    start(tmp_path, '20260101_000000', losses(10, 20, 30), pictures=(20,))
    start(tmp_path, '20260101_000100', losses(10, offset=0.5))
    run = read_run(str(tmp_path))
    assert (
        run.scalars == {'online/loss_fm': {10: 10.5}} and not run.pictures and len(run.starts) == 1
    )


def test_config_is_held_against_the_packaged_one_it_came_from(tmp_path):
    for config in ('fgm/cifar10_cond_sid.py', 'reflow/digits.py', 'fgm/digits.py'):
        cfg = read_config(str(ROOT / 'configs' / config))
        cfg.merge_from_dict({'train_cfg.max_iters': 7, 'work_dir': 'elsewhere', 'resume': True})
        cfg.dump(tmp_path / 'dumped.py')
        cfg = read_config(str(tmp_path / 'dumped.py'))
        name, base = closest_packaged_config(cfg)
        assert name == f'mmfgm::{config}'
        assert [key for key, _, _ in config_difference(cfg, base)] == ['train_cfg.max_iters']
    # keys are those of --cfg-options, also inside lists
    cfg.merge_from_dict({'param_scheduler.online.0.end_factor': 0.5, 'model.extra': 1})
    assert config_difference(cfg, base)[:2] == [
        ('model.extra', None, '1'),
        ('param_scheduler.online.0.end_factor', '0.1', '0.5'),
    ]


def test_packaged_configs_that_cannot_be_read_are_left_out(tmp_path, monkeypatch):
    run = start(tmp_path / 'run', '20260101_000000', losses(10, 20))
    folder = tmp_path / '.mim' / 'configs' / 'fgm'
    folder.mkdir(parents=True)
    monkeypatch.setattr(mmfgm, '__file__', str(tmp_path / '__init__.py'))
    for name, text, heading in (
        ('nothing', None, '<h3>Config</h3>'),
        ('broken', 'x = 1 +', '<h3>Config</h3>'),
        ('whole', 'x = 1', '<h3>Config, beside mmfgm::fgm/whole.py</h3>'),
    ):
        if text:
            (folder / f'{name}.py').write_text(text)
        page = open(report([str(run)])).read()
        assert heading in page and 'end_factor' in page  # the whole config is there all the same


def test_panels_need_a_picture(tmp_path):
    start(tmp_path, '20260101_000000', losses(10))
    with pytest.raises(UsageError, match='add --curves, or leave --panels out'):
        report([str(tmp_path), '--panels', 'loss'])
    assert not (tmp_path / 'report.html').exists()


def test_runs_beside_each_other_share_panels(tmp_path):
    runs = [
        start(
            tmp_path / name,
            '20260101_000000',
            [*losses(10, 20, offset=i), {'fd/fd': 1.0 + i, 'step': 20}],
        )
        for i, name in enumerate(('a', 'b'))
    ]
    first, second = (read_run(str(run)) for run in runs)
    groups = group_scalars(first, [second])
    assert groups['Losses'] == {
        'online/loss_fm': {'a': {10: 10.0, 20: 20.0}, 'b': {10: 11.0, 20: 21.0}}
    }
    assert groups['Metrics'] == {'fd/fd': {'a': {20: 1.0}, 'b': {20: 2.0}}}
    page = open(report([str(runs[0]), '--beside', str(runs[1])])).read()
    assert page.count('>b</text>') == 2
    curves = ['--curves', str(tmp_path / 'curves.png'), '--panels']
    report([str(runs[0]), *curves, 'loss_fm', 'loss_d'])
    one_row = Image.open(tmp_path / 'curves.png').height
    report([str(runs[0]), *curves, 'loss', 'fd'])
    assert Image.open(tmp_path / 'curves.png').height == one_row  # two panels in a row
    with pytest.raises(UsageError, match="there are \\['fd/fd', 'online/loss_fm'\\]"):
        report([str(runs[0]), *curves, 'nothing'])


def test_what_was_measured_at_several_calls_is_a_panel_over_them(tmp_path):
    teacher = {'1': 5.0, '10': 0.5, '100': 0.1}
    tables = dict(
        four=dict(teacher=teacher, generator={'1': 0.9, '4': 0.2}),
        one=dict(teacher=teacher, generator={'1': 0.3}),
    )
    runs = {}
    for name, table in tables.items():
        run = start(tmp_path / name, '20260101_000000', losses(10))
        (run / 'test').mkdir()
        (run / 'test' / 'metrics.json').write_text(json.dumps({'fd/fd': table}))
        Image.new('RGB', (4, 4)).save(run / 'test' / 'fd_fd_vs_nfe.png')
        runs[name] = read_run(str(run))
    title = 'fd/fd over network calls'
    ours = {'teacher': {1: 5.0, 10: 0.5, 100: 0.1}, 'generator': {1: 0.9, 4: 0.2}}
    assert over_nfe(runs['four']) == {title: ours}
    both = over_nfe(runs['four'], [runs['one']])[title]
    # the teacher, whose numbers are equal, comes once
    assert list(both) == ['four, teacher', 'four, generator', 'one, generator']
    assert both['one, generator'] == {1: 0.3}
    runs['one'].tables['fd/fd'].pop('teacher')
    assert not over_nfe(runs['one'])  # nothing goes over calls
    page = open(report([str(tmp_path / 'four'), '--beside', str(tmp_path / 'one')])).read()
    assert page.count('network calls (NFE)</text>') == 1 and '>one, generator</text>' in page
    assert 'test/fd_fd_vs_nfe.png' not in page  # the panel says it
    curves = tmp_path / 'curves.png'
    report([str(tmp_path / 'four'), '--curves', str(curves), '--panels', 'network calls'])
    assert curves.is_file()


def test_gradients_of_several_networks_share_a_panel(tmp_path):
    values = {
        'online/grad_norm_online': 1.0,
        'online/grad_norm_discriminator': 2.0,
        'generator/grad_norm': 3.0,
        'online.lr': 4.0,
    }
    start(tmp_path, '20260101_000000', [{**values, 'step': 10}])
    panels = group_scalars(read_run(str(tmp_path)))
    assert panels == {
        'Optimization': {
            'gradient norm, before clipping': {
                'online': {10: 1.0},
                'discriminator': {10: 2.0},
                'generator': {10: 3.0},
            },
            'learning rate': {'online': {10: 4.0}},
        }
    }


def test_the_ends_of_an_interval_are_in_the_panel_of_their_metric(tmp_path):
    start(
        tmp_path,
        '20260101_000000',
        [{'fd/overall': 2.0, 'fd/overall_low': 1.0, 'fd/overall_high': 3.0, 'step': 10}],
    )
    (panel,) = group_scalars(read_run(str(tmp_path)))['Metrics'].items()
    assert panel == ('fd/overall', {tmp_path.name: {10: 2.0}, 'low': {10: 1.0}, 'high': {10: 3.0}})


BAD = {
    'no folder': (lambda path: path / 'nowhere', 'there is no folder'),
    'no work dir': (
        lambda path: path,
        'is no work dir of a training; expected TIMESTAMP/vis_data/scalars.json',
    ),
    'a folder of work dirs': (
        lambda path: start(path / 'run', '20260101_000000', losses(1)).parent,
        'run: name one of them',
    ),
    'broken scalars': (
        lambda path: start(path, '20260101_000000', [], torn='{"a\n{}\n'),
        'line 1 is not a JSON object',
    ),
}


@pytest.mark.parametrize('make, message', BAD.values(), ids=BAD)
def test_bad_input(make, message, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        report([str(make(tmp_path))])
    assert not list(tmp_path.rglob('report.html'))


def test_what_is_shown_of_many_pictures_and_of_markup(tmp_path):
    start(tmp_path, '20260101_000000', losses(10, 20), log='', pictures=range(10, 100, 10))
    text = tmp_path / '20260101_000000' / 'vis_data' / 'config.py'
    text.write_text(
        text.read_text().replace("work_dir = 'x'", "note = '<script>alert(1)</script>'")
    )
    page = open(
        report([str(tmp_path), '--pictures', '3', '--out', str(tmp_path / 'page.html')])
    ).read()
    assert (
        re.findall('<figcaption>iteration (.*?)<', page) == ['10', '50', '90']
        and '3 of 9 pictures' in page
    )
    assert re.findall('<figcaption>(geneval.*?)<', page) == ['geneval_sheet, iteration 90']
    assert (
        '<script' not in page
        and '&lt;script&gt;' in page
        and 'end_factor</code></td><td><code>0.1' in page
    )


@pytest.mark.slow
def test_report_of_a_quickstart_in_a_browser(tmp_path):
    folder = tmp_path / 'quickstart'
    run_module(
        'mmfgm.tools.quickstart',
        '--work-dir',
        folder,
        '--pretrain-iters',
        9,
        '--distill-iters',
        50,
        '--num-samples',
        80,
    )
    run_module('mmfgm.tools.report', folder, '--curves', tmp_path / 'curves.png')
    assert (
        Image.open(tmp_path / 'curves.png').size[0] > 500
        and (tmp_path / 'curves.png').stat().st_size < 100_000
    )
    metrics = json.loads((folder / 'metrics.json').read_text())['metrics']
    requested = []
    with open_browser() as browser:
        for scheme, width in (('light', 1280), ('dark', 400)):
            page = browser.new_page(color_scheme=scheme, viewport=dict(width=width, height=900))
            page.on('request', lambda request: requested.append(request.url))
            page.goto(f'file://{folder}/report.html')
            sizes = page.eval_on_selector_all('img', 'all => all.map(image => image.naturalWidth)')
            # two of the quickstart, one of the sample hook for each run
            assert len(sizes) == 4 and min(sizes) > 100
            titles = page.eval_on_selector_all(
                'figure svg', 'all => all.map(svg => svg.textContent)'
            )
            for panel in (
                'network/loss_fm',
                'online/loss_fm',
                'generator/loss_fgm',
                'generator/l_2',
                'gradient norm',
                'learning rate',
                'samples per second',
                'share of the time',
            ):
                assert any(panel in title for title in titles), panel
            boxes = page.eval_on_selector_all(
                'figure svg', 'all => all.map(svg => svg.getBoundingClientRect().width)'
            )
            assert min(boxes) > 250
            assert page.evaluate('document.scrollingElement.scrollWidth <= window.innerWidth')
            colours = page.evaluate(
                '[document.body, document.querySelector("svg text")].map('
                'x => [getComputedStyle(x).color, getComputedStyle(x).fill])'
            )
            assert colours[0][0] == colours[1][1]
            text = page.inner_text('body')
            for network, values in metrics['fd/fd'].items():
                for nfe, value in values.items():
                    assert re.search(rf'{network}\s+{nfe}\s+{value:.4f}', text)
            for words in (
                'train_cfg.max_iters\t3500\t9',
                'train_cfg.max_iters\t2400\t50',
                'PyTorch',
                '9 of 9',
            ):
                assert words in text, words
    assert [url for url in requested if not url.startswith(('file:', 'data:'))] == []


def test_a_work_dir_from_a_stranger_runs_nothing(tmp_path):
    folder = tmp_path / 'run' / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'config.py').write_text(f'import os\nos.system("touch {tmp_path / "ran"}")\n')
    (folder / 'scalars.json').write_text('{"iter": 1, "loss": 0.5, "step": 1}\n')
    with pytest.raises(UsageError, match='config that a run wrote'):
        report([str(tmp_path / 'run')])
    assert not (tmp_path / 'ran').exists()
