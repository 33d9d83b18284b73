# Copyright (c) mmfgm authors.
import json
import os
from glob import glob

import pytest

from mmfgm.apis.report import read_run
from mmfgm.errors import UsageError
from mmfgm.tools.compare import compare

TINY = (
    'train_cfg.max_iters=4',
    'train_dataloader.batch_size=16',
    'evaluations.fd.interval=2',
    'evaluations.fd.dataset.num_samples=100',
    'default_hooks.samples=None',
    'model.teacher.checkpoint=None',
)


@pytest.mark.slow
def test_runs_side_by_side_and_again(tmp_path, monkeypatch, capsys):
    """What stands in the table is what each run measured; finished runs are not trained again."""
    monkeypatch.chdir(tmp_path)
    configs = ['mmfgm::fgm/digits.py', 'mmfgm::fgm/digits_dmd.py']
    command = [*configs, '--work-dir', 'out', '--seeds', '3', '--cfg-options', *TINY]
    compare(command)
    results = json.load(open('out/results.json'))
    assert sorted(results) == ['digits', 'digits_dmd']
    for name, runs in results.items():
        measured = read_run(f'out/{name}/seed_3').scalars['fd/fd']
        assert {int(k): v for k, v in runs['3']['curve'].items()} == measured
        assert sorted(measured) == [2, 4] and runs['3']['final'] == measured[4]
        assert runs['3']['cycles'] == 4 and runs['3']['seconds_per_cycle'] > 0
        # a process that has imported torch and trained
        assert 50 * 2**20 < runs['3']['peak_bytes'] < 8 * 2**30
    assert results['digits']['3']['curve'] != results['digits_dmd']['3']['curve']
    table = open('out/table.md').read()
    assert f'{results["digits"]["3"]["final"]:.4f}' in table and os.path.isfile('out/curves.png')
    assert table in capsys.readouterr().out

    before = {path: os.stat(path).st_mtime_ns for path in glob('out/*/seed_3/*.pth')}
    assert sum(path.endswith('iter_4.pth') for path in before) == 2
    compare(command)
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    assert json.load(open('out/results.json')) == results


def test_bad_requests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="'digits'.* comes twice"):
        compare(['mmfgm::fgm/digits.py', 'mmfgm::fgm/digits.py'])
    with pytest.raises(UsageError, match='name the metric'):
        compare(['mmfgm::reflow/digits.py', '--cfg-options', 'default_hooks.checkpoint=None'])
