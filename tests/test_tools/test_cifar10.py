# Copyright (c) mmfgm authors.
"""The CIFAR-10 recipes, from data in CIFAR's own files to a measured one-step generator, with a
small network."""

import json
import re

import pytest
import torch

from tests.cifar_format import write_digits_as_cifar10
from tests.conftest import ROOT, run_module, train

SMALL = (
    'model.network.unet.model_channels=16',
    'model.network.unet.channel_mult=[1,2]',
    'model.network.unet.num_blocks=1',
    'train_dataloader.batch_size=8',
    'evaluations.fid.interval=4',
    'evaluations.fid.dataset.num_samples=40',
    'evaluations.fid.batch_size=16',
    'evaluations.fid.metrics.fid.feature.type=SmallConvFeatures',
    'default_hooks.checkpoint.interval=4',
    'default_hooks.samples.interval=1000',
    'default_hooks.logger.interval=1',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cifar10')
    write_digits_as_cifar10(folder / 'data')
    for kind in ('reflow', 'fgm'):
        # custom imports alone cannot be given on the command line
        (folder / f'{kind}.py').write_text(
            f'_base_ = [{str(ROOT / f"configs/{kind}/cifar10_cond.py")!r}]\n'
            "custom_imports = dict(imports=['tests.helpers'])\n"
        )
    return folder


def data(where, folder):
    return f'{where}.data_root={folder / "data"}', f'{where}.verify=False'


def options(folder, *more):
    return (*SMALL, *data('evaluations.fid.metrics.fid.reference', folder), *more)


def reflow_options(folder):
    return options(
        folder,
        *data('train_dataloader.dataset', folder),
        'train_cfg.max_iters=8',
        'evaluations.fid.sampling.nfe=2',
    )


def fgm_options(folder):
    return options(
        folder, 'train_cfg.max_iters=12', f'model.teacher.checkpoint={folder / "reflow"}'
    )


@pytest.fixture(scope='module')
def teacher(folder):
    train(folder / 'reflow.py', folder / 'reflow', *reflow_options(folder))
    return folder / 'reflow'


@pytest.fixture(scope='module')
def generator(folder, teacher):
    train(folder / 'fgm.py', folder / 'fgm', *fgm_options(folder))
    return folder / 'fgm'


def state(path):
    return torch.load(path, weights_only=True)['state_dict']


def logged_fids(work_dir):
    text = ''.join(path.read_text() for path in sorted(work_dir.glob('*/*.log')))
    return {
        int(i): float(v)
        for i, v in re.findall(r'Evaluation at iteration (\d+):  fid/fid: ([\d.]+)', text)
    }


@pytest.mark.slow
def test_best_checkpoint_is_the_one_of_the_lowest_fid(generator):
    fids = logged_fids(generator)
    assert list(fids) == [4, 8, 12]
    best = min(fids, key=fids.get)
    kept = [path.name for path in generator.glob('best_*')]
    assert kept == [f'best_fid_fid_iter_{best}.pth']
    networks = {key.split('.')[0] for key in state(generator / kept[0])}
    assert networks == {
        'online',
        'generator',
        'generator_ema',
        'generator_ema_9996',
        'generator_ema_9999',
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind, last, build',
    [('reflow', 'iter_8.pth', reflow_options), ('fgm', 'iter_12.pth', fgm_options)],
)
def test_resume_equals_uninterrupted(kind, last, build, folder, generator):
    """Also with flips, which the preprocessor draws."""
    killed = folder / f'{kind}_killed.py'
    killed.write_text(
        f"_base_ = [{str(folder / f'{kind}.py')!r}]\ncustom_hooks = [dict(type='KillHook', at=6,"
        " when='before')]\n"
    )
    train(killed, folder / f'{kind}_resumed', *build(folder), codes=(-9,))
    train(folder / f'{kind}.py', folder / f'{kind}_resumed', *build(folder), resume=True)
    resumed, uninterrupted = state(folder / f'{kind}_resumed' / last), state(folder / kind / last)
    assert list(resumed) == list(uninterrupted)
    for key in resumed:
        assert torch.equal(resumed[key], uninterrupted[key]), key


@pytest.mark.slow
def test_teacher_curve_with_the_students_point(folder, generator, tmp_path):
    run_module(
        'mmfgm.tools.test',
        folder / 'fgm.py',
        generator / 'iter_12.pth',
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
        '--cfg-options',
        *fgm_options(folder),
    )
    table = json.loads((tmp_path / 'metrics.json').read_text())['fid/fid']
    assert list(table['teacher']) == ['2', '4'] and list(table['generator_ema']) == ['1']
    assert table['generator_ema']['1'] == pytest.approx(logged_fids(generator)[12], abs=1e-4)
    assert (tmp_path / 'fid_fid_vs_nfe.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cifar10_uncond_l1', 'cifar10_cond_sid', 'cifar10_uncond_edm'])
def test_variants_take_a_step(name, folder, tmp_path):
    """From the weights that the network starts with: an EDM teacher is loaded in
    test_edm_checkpoint."""
    (tmp_path / 'config.py').write_text(
        f'_base_ = [{str(ROOT / f"configs/fgm/{name}.py")!r}]\n'
        "custom_imports = dict(imports=['tests.helpers'])\n"
        'model = dict(teacher=dict(checkpoint=None))\n'
    )
    train(tmp_path / 'config.py', tmp_path / 'run', *options(folder, 'train_cfg.max_iters=1'))
    assert (tmp_path / 'run' / 'iter_1.pth').exists()
