# Copyright (c) mmfgm authors.
"""Each mistake of a user: one screen, exit code 2, no traceback, before training starts."""

import importlib.metadata

import pytest
import torch

import mmfgm
from mmfgm.engine.strategies import DDPStrategy
from mmfgm.errors import UsageError
from mmfgm.models import read_state_dict
from mmfgm.tools import test as test_tool
from mmfgm.tools import train as train_tool


def run(main, argv, capsys):
    """Exit code and what went to stderr (the log goes there too, so only the end counts)."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    message = capsys.readouterr().err.rsplit('\nerror: ', 1)[-1]
    assert 'Traceback' not in message and message.count('\n') < 12 and len(message) < 1500
    return stop.value.code, message


TRAIN_ERRORS = {
    'missing teacher': (
        ['model.teacher.checkpoint=nowhere.pth'],
        "checkpoint 'nowhere.pth' does not exist",
    ),
    'other architecture': (
        ['model.network.width=32'],
        "'input.weight' has shape (16, 64) there, but the config builds (32, 64)",
    ),
    'no such network': (['model.teacher.prefix=student'], "has no network 'student'"),
    'unknown key of a class': (
        ['train_cfg.max_itres=3'],
        "for the phases of FGM, found 'max_itres'",
    ),
    'unknown key of a loss': (['model.loss.alpha=1.2'], "unexpected keyword argument 'alpha'"),
    'unknown type': (['model.network.type=UNet3D'], 'UNet3D is not in the'),
    'misspelt section': (['optim_wraper.online.optimizer.lr=1'], "did you mean 'optim_wrapper'"),
    'unused section': (['val_cfg.interval=3'], 'use evaluations'),
    'online_updates': (
        ['train_cfg.online_updates=0'],
        'online_updates must be a whole number of at least 1, but is 0',
    ),
    'integer beta': (['optim_wrapper.generator.optimizer.betas=0,0.999'], 'write 0.0 instead of 0'),
    'no optimizer for a network': (
        ['optim_wrapper.critic.optimizer.type=Adam'],
        'must name the trained networks',
    ),
    'unknown precision': (
        ['strategy.precision=fp8'],
        "must be one of ('fp32', 'tf32', 'bf16', 'auto')",
    ),
    'no seed': (['randomness.seed=None'], 'randomness.seed must be a whole number'),
    'best of an unknown metric': (
        ['default_hooks.checkpoint.save_best=fid'],
        "names 'fid', but the evaluations measure ['fd/fd']",
    ),
    'one-step network at many NFE': (['evaluations.fd.sampling.nfe=4'], 'its NFE is 1, not 4'),
    'unknown network to draw': (
        ['default_hooks.samples.samplings.x.network=critic'],
        "no network 'critic'",
    ),
    'clipping by value': (
        ['optim_wrapper.online.clip_grad.type=value'],
        'clip_grad must be dict(max_norm=...)',
    ),
    'sharding without processes': (
        ['strategy.type=FSDP2Strategy', 'strategy.block_types=AdaLNBlock,'],
        'tools/dist_train.sh',
    ),
    'unknown hook': (['default_hooks.extra.type=Confetti'], 'Confetti is not in the'),
    'unknown network to evaluate': (
        ['evaluations.fd.sampling.network=critic'],
        "no network 'critic'",
    ),
    'bad time sampler': (['model.fm_time_sampler.std=-1'], 'std > 0'),
    'bad t_star': (['model.generator.t_star=970'], 't_star must lie in [0, 1]'),
}


@pytest.mark.parametrize('options, expected', TRAIN_ERRORS.values(), ids=TRAIN_ERRORS)
def test_training(options, expected, tiny, tmp_path, capsys):
    code, message = run(
        train_tool.main,
        [tiny / 'fgm.py', '--work-dir', tmp_path, '--cfg-options', *options],
        capsys,
    )
    assert code == 2 and expected in message
    assert not list(tmp_path.glob('*.pth'))


def test_unwritable_work_dir(tiny, tmp_path, capsys):
    (tmp_path / 'file').write_text('in the way')
    code, message = run(
        train_tool.main, [tiny / 'fgm.py', '--work-dir', tmp_path / 'file' / 'run'], capsys
    )
    assert code == 2 and 'cannot be written to' in message and '--work-dir' in message


def test_missing_config(capsys):
    code, message = run(train_tool.main, ['nowhere.py'], capsys)
    assert code == 2 and "no config 'nowhere.py'" in message


def test_missing_base(tmp_path, capsys):
    (tmp_path / 'c.py').write_text("_base_ = 'nowhere.py'")
    code, message = run(train_tool.main, [tmp_path / 'c.py'], capsys)
    assert code == 2 and 'cannot be read' in message


def test_resume_from_a_missing_checkpoint(tiny, tmp_path, capsys):
    code, message = run(
        train_tool.main,
        [tiny / 'fgm.py', '--work-dir', tmp_path, '--resume', 'nowhere.pth'],
        capsys,
    )
    assert code == 2 and "'nowhere.pth' does not exist" in message


@pytest.mark.parametrize(
    'extra, expected',
    [
        ([], 'needs a checkpoint'),
        (['nowhere.pth'], 'does not exist'),
        (['TEACHER'], 'does not fit the model of this config'),
        (
            ['STUDENT', '--cfg-options', 'model.network.width=32'],
            "tensor 'online.input.weight' has shape (16, 64) in the checkpoint",
        ),
        (['--network', 'teacher', '--nfe', '3', '--solver', 'heun'], 'multiple'),
        (['--network', 'teacher', '--solver', 'rk45'], 'euler or heun'),
        (['--network', 'teacher', '--evaluation', 'fid'], "not ['fid']"),
    ],
)
def test_testing(extra, expected, tiny, tmp_path, capsys):
    teacher = tiny / 'teacher_run' / 'iter_30.pth'
    weights = {
        key.split('.', 1)[1]: value
        for key, value in read_state_dict(str(teacher)).items()
        if 'ema' in key
    }
    torch.save(
        dict(
            state_dict={
                f'{name}.{key}': value
                for key, value in weights.items()
                for name in ('online', 'generator.network', 'generator_ema.network')
            }
        ),
        tmp_path / 'fgm.pth',
    )
    extra = [
        arg.replace('TEACHER', str(teacher)).replace('STUDENT', str(tmp_path / 'fgm.pth'))
        for arg in extra
    ]
    code, message = run(test_tool.main, [tiny / 'fgm.py', *extra, '--work-dir', tmp_path], capsys)
    assert code == 2 and expected in message


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    with pytest.raises(
        UsageError, match='8 processes were started on this machine, but it has 2 GPU'
    ):
        DDPStrategy._setup_distributed(object.__new__(DDPStrategy))


@pytest.mark.parametrize('upstream', ['mmengine', 'mmcv', 'mmdet'])
def test_upstream_packages_over_onedl(upstream, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        mmfgm.metadata, 'version', lambda name: '0.10.7' if name == upstream else real(name)
    )
    with pytest.raises(ImportError, match=f'pip uninstall -y {upstream} onedl-{upstream}'):
        mmfgm._check_distributions()
