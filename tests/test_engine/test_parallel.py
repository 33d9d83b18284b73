# Copyright (c) mmfgm authors.
"""Sharded and replicated training equals one process on the same global batch."""

import glob
import shutil

import pytest
import torch
import torch.distributed as dist

from mmfgm.engine import FSDP2Strategy, SingleDeviceStrategy
from mmfgm.errors import UsageError
from mmfgm.models import choose_precision, read_state_dict
from tests.conftest import tool_env, train

# Adam divides by the gradient's size, so float32 noise in a tiny gradient would become a full step:
# a large eps keeps the comparison about the gradients
OPTIONS = (
    'model.type=RowNoiseFGM',
    'train_cfg.max_iters=5',
    'default_hooks.checkpoint.interval=5',
    'evaluations.fd.interval=5',
    'optim_wrapper.online.optimizer.eps=1.5e-4',
    'optim_wrapper.generator.optimizer.eps=1.5e-4',
    'optim_wrapper.generator.clip_grad.max_norm=0.01',
)
FSDP2 = ('strategy.type=FSDP2Strategy', 'strategy.block_types=AdaLNBlock,')
TOLERANCE = dict(rtol=1e-4, atol=2e-6)


def final_state(work_dir):
    return read_state_dict(str(work_dir))


def fd_values(work_dir):
    log = open(glob.glob(f'{work_dir}/*/*.log')[0]).read()
    return [float(line.split('fd/fd: ')[1]) for line in log.splitlines() if 'Evaluation at' in line]


@pytest.fixture(scope='module', params=[1, 3], ids=['accumulation 1', 'accumulation 3'])
def single(request, tiny, tmp_path_factory):
    """One process, batch 8."""
    work_dir = tmp_path_factory.mktemp('single')
    train(tiny / 'fgm.py', work_dir, *OPTIONS, f'train_cfg.accumulation={request.param}')
    return request.param, work_dir


@pytest.mark.slow
@pytest.mark.parametrize('strategy', [(), FSDP2], ids=['DDP', 'FSDP2'])
def test_two_processes_equal_one(single, strategy, tiny, tmp_path):
    accumulation, work_dir = single
    train(
        tiny / 'fgm.py',
        tmp_path,
        *OPTIONS,
        *strategy,
        f'train_cfg.accumulation={accumulation}',
        'train_dataloader.batch_size=4',
        nproc=2,
    )
    check_equal(work_dir, tmp_path, tiny)


@pytest.mark.slow
@pytest.mark.parametrize('single', [3], ids=['accumulation 3'], indirect=True)
def test_two_groups_of_two_processes_equal_one(single, tiny, tmp_path):
    """HSDP: sharded within a group, replicated across groups."""
    _, work_dir = single
    train(
        tiny / 'fgm.py',
        tmp_path,
        *OPTIONS,
        *FSDP2,
        'strategy.shard_size=2',
        'train_cfg.accumulation=3',
        'train_dataloader.batch_size=2',
        nproc=4,
    )
    check_equal(work_dir, tmp_path, tiny)


def test_groups_are_neighbours_and_must_divide_the_processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group('fake', rank=0, world_size=6, store=FakeStore())
    try:
        strategy = object.__new__(FSDP2Strategy)
        strategy.shard_size = 3
        mesh = strategy._mesh('cpu')
        assert mesh.mesh.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert mesh.mesh_dim_names == ('replicate', 'shard')
        for size in (0, 4):
            strategy.shard_size = size
            with pytest.raises(UsageError, match=f'to divide.*found {size} and 6 processes'):
                strategy._mesh('cpu')
    finally:
        dist.destroy_process_group()


def check_equal(work_dir, other, tiny):
    """The run in ``other`` ended where that in ``work_dir`` did."""
    expected, found = final_state(work_dir), final_state(other)
    assert expected.keys() == found.keys() and {key.split('.')[0] for key in found} == {
        'online',
        'generator',
        'generator_ema',
    }
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, **TOLERANCE, msg=lambda m, key=key: f'{key}: {m}'
        )
    start = read_state_dict(str(tiny / 'teacher_run'))
    moved = max(
        (value - start[f'network_ema.{key.split(".", 1)[1]}']).abs().max()
        for key, value in expected.items()
        if key.startswith('online.')
    )
    assert moved > 100 * TOLERANCE['atol'], (
        'the networks hardly moved, so the comparison shows nothing'
    )
    assert fd_values(other) == [pytest.approx(v, rel=1e-3) for v in fd_values(work_dir)]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
def test_compiled_equals_eager(tiny, tmp_path):
    options = (
        *OPTIONS[1:],
        'train_cfg.max_iters=2',
        'default_hooks.checkpoint.interval=2',
        'evaluations.fd.interval=0',
    )
    train(tiny / 'fgm.py', tmp_path / 'eager', *options)
    train(
        tiny / 'fgm.py',
        tmp_path / 'compiled',
        *options,
        'strategy.compile=True',
        env=tool_env(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache')),
    )
    assert list((tmp_path / 'cache').rglob('*.so')), 'nothing was compiled'
    expected, found = final_state(tmp_path / 'eager'), final_state(tmp_path / 'compiled')
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, **TOLERANCE, msg=lambda m, key=key: f'{key}: {m}'
        )


def test_precision_sets_tf32():
    for precision, allowed in (('fp32', False), ('tf32', True), ('bf16', True)):
        SingleDeviceStrategy(precision=precision)._allow_tf32()
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    with pytest.raises(UsageError, match="one of .* but is 'fp16'"):
        SingleDeviceStrategy(precision='fp16')


def log_of(folder, precision):
    """A strategy's choice, and what it logged."""
    # loggers are kept by name: that of another test would be taken
    options = dict(work_dir=str(folder), experiment_name=str(folder).replace('/', '_'))
    strategy = SingleDeviceStrategy(precision=precision, **options)
    (log,) = folder.rglob('*.log')
    return strategy.precision, log.read_text()


@pytest.mark.parametrize(
    'flags, chosen, why',
    [
        (dict(avx512_bf16=True, amx_bf16=False), 'bf16', 'this CPU has avx512_bf16'),
        (dict(avx512_bf16=True, amx_bf16=True), 'bf16', 'has avx512_bf16 and amx_bf16'),
        (dict(avx512_f=True, amx_bf16=False), 'fp32', 'neither avx512_bf16 nor amx_bf16'),
        # torch that cannot be asked
        (None, 'fp32', 'neither'),
    ],
)
def test_auto_takes_bf16_where_the_cpu_has_it(flags, chosen, why, monkeypatch, tmp_path):
    if flags is None:
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    else:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: flags, raising=False)
    precision, log = log_of(tmp_path, 'auto')
    assert precision == chosen
    assert f"strategy.precision='auto' is {chosen} here" in log and why in log


def test_auto_on_a_gpu_and_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A100')
    for supported, expected in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr(
            torch.cuda,
            'is_bf16_supported',
            # what is emulated is no support
            lambda including_emulation=True, here=supported: here or including_emulation,
        )
        chosen, why = choose_precision('cuda')
        assert chosen == expected and 'A100' in why
    assert choose_precision('mps')[0] == 'fp32'


def test_bf16_is_said_to_be_slow_where_the_cpu_emulates_it(monkeypatch, tmp_path):
    for flags, warned in ((dict(avx512_bf16=True), False), (dict(), True)):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda flags=flags: flags, raising=False)
        precision, log = log_of(tmp_path / str(warned), 'bf16')
        assert precision == 'bf16' and ('is slow here' in log) is warned


def test_one_process_without_bf16_decides_for_all(monkeypatch, tmp_path):
    found = [('bf16', 'an A100'), ('fp32', 'a V100'), ('bf16', 'an A100')]
    monkeypatch.setattr('mmfgm.engine.strategies.all_gather_object', lambda mine: found)
    precision, log = log_of(tmp_path, 'auto')
    assert precision == 'fp32' and 'a V100' in log


@pytest.mark.slow
@pytest.mark.parametrize(
    'strategy, nproc', [((), 0), ((), 2), (FSDP2, 2)], ids=['single', 'DDP', 'FSDP2']
)
def test_bf16_keeps_gradients_and_weights_in_float32(strategy, nproc, tiny, tmp_path):
    train(
        tiny / 'fgm.py',
        tmp_path,
        *strategy,
        'strategy.precision=bf16',
        'train_cfg.max_iters=3',
        'default_hooks.checkpoint.interval=3',
        'default_hooks.dtypes.type=GradientDtypeHook',
        nproc=nproc,
    )
    assert all(
        value.dtype == torch.float32 and value.isfinite().all()
        for value in final_state(tmp_path).values()
    )


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_on_one_process_and_feeds_tools(tiny, tmp_path):
    """2 -> 1 processes, then the sharded directory as a teacher."""
    sharded = (*FSDP2, 'train_cfg.max_iters=10')
    teacher = tmp_path / 'teacher'
    train(tiny / 'teacher.py', teacher, *sharded, 'default_hooks.checkpoint.interval=5', nproc=2)
    result = train(
        tiny / 'teacher.py', teacher, *sharded[:2], 'train_cfg.max_iters=12', nproc=1, resume=True
    )
    assert 'fresh random numbers' in result.stdout + result.stderr
    assert (teacher / 'iter_12').is_dir() or (teacher / 'iter_12.pth').is_dir()
    train(
        tiny / 'fgm.py',
        tmp_path / 'fgm',
        f'model.teacher.checkpoint={teacher}',
        'train_cfg.max_iters=2',
    )
