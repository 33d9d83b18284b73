# Copyright (c) mmfgm authors.
"""Couplings of teachers whose ODE has a closed form, and what is learned from them."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn

from mmfgm.caches import ShardWriter
from mmfgm.datasets import Couplings, WithReal, check_finite_batch, item_seed, verify_cache
from mmfgm.errors import NonFiniteError, UsageError
from mmfgm.flow import euler, uniform_times
from mmfgm.models import FlowMatching, ImagePreprocessor
from mmfgm.registry import MODELS
from mmfgm.tools.draw_couplings import draw_couplings
from mmfgm.tools.train import train
from tests.conftest import LIMIT, ROOT, run_module, tool_env
from tests.gaussians import implicit_velocity

MATRIX = torch.tensor([[0.5, -0.3], [0.2, 0.8]])


@MODELS.register_module()
class LinearTeacher(nn.Module):
    """``v(x, t) = A x + b_label``: Euler's steps have a closed form."""

    event_shape = (2,)

    def __init__(self, num_classes=0):
        super().__init__()
        self.num_classes = num_classes
        self.matrix = nn.Parameter(MATRIX.clone())
        self.shift = nn.Parameter(torch.arange(2.0 * max(num_classes, 1)).view(-1, 2))

    def forward(self, x_t, t, labels=None):
        shift = self.shift[0] if labels is None else self.shift[labels]
        return x_t @ self.matrix.T + shift


@MODELS.register_module()
class GaussianTeacher(nn.Module):
    """The marginal velocity of ``N(mean, scale^2)``, whose paths are curved."""

    event_shape = (1,)
    num_classes = 0

    def __init__(self, scale=0.1, mean=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x_t, t):
        return implicit_velocity(x_t, t[:, None], self.scale, self.mean)


def teacher(folder, **network):
    """A config of a teacher and its checkpoint."""
    config = folder / 'teacher.py'
    model = dict(type='FlowMatching', network=network, time_sampler=dict(type='Uniform'))
    config.write_text(
        f"default_scope = 'mmfgm'\ncustom_imports = dict(imports=['{__name__}'])\nmodel = {model!r}"
    )
    with DefaultScope.overwrite_default_scope('mmfgm'):
        state = MODELS.build(model).state_dict()
    torch.save(dict(state_dict=state), folder / 'teacher.pth')
    return str(config), str(folder / 'teacher.pth')


def draw(made, out, *args):
    draw_couplings([*made, str(out), *map(str, args)])
    return Couplings(str(out), verify=True)


def everything(cache):
    return cache.__getitems__(range(len(cache)))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def linear(tmp_path):
    return teacher(tmp_path, type='LinearTeacher')


def test_a_teachers_own_samples_stand_for_real_ones(linear, tmp_path):
    pairs = everything(draw(linear, tmp_path / 'out', '--num-pairs', 4, '--nfe', 2))
    data = WithReal(
        conditions=dict(type='ConditionDataset', num_classes=0),
        real=dict(type='Couplings', path=str(tmp_path / 'out')),
    )
    batch = data.__getitems__([2, 0])
    assert batch['real'].keys() == {'x_0', 'cond'} and 'eps' not in batch
    assert torch.equal(batch['real']['x_0'], pairs['x_0'][[2, 0]])


def test_pairs_of_a_linear_teacher_are_the_closed_form(linear, tmp_path):
    args = ('--num-pairs', 7, '--nfe', 4, '--shard-size', 3, '--batch-size', 2, '--dtype', 'fp32')
    pairs = everything(draw(linear, tmp_path / 'out', *args, '--seed', 5))
    expected = torch.stack(
        [torch.randn(2, generator=torch.Generator().manual_seed(item_seed(i, 5))) for i in range(7)]
    )
    assert torch.equal(pairs['eps'], expected) and pairs['cond'] == {}
    shift = torch.tensor([0.0, 1.0])
    for _ in range(4):
        expected = expected - (expected @ MATRIX.T + shift) / 4
    torch.testing.assert_close(pairs['x_0'], expected)
    # half the space costs a rounding
    half = everything(draw(linear, tmp_path / 'half', *args[:-1], 'fp16', '--seed', 5))
    assert half['x_0'].dtype == torch.float32
    torch.testing.assert_close(half['x_0'], pairs['x_0'], rtol=2**-11, atol=2**-20)
    torch.testing.assert_close(half['eps'], pairs['eps'], rtol=2**-11, atol=2**-20)


def test_labels_are_those_of_generation(tmp_path):
    made = teacher(tmp_path, type='LinearTeacher', num_classes=3)
    args = ('--num-pairs', 8, '--nfe', 1, '--shard-size', 3, '--dtype', 'fp32')
    pairs = everything(draw(made, tmp_path / 'out', *args))
    labels = torch.arange(8) % 3
    assert torch.equal(pairs['cond']['labels'], labels)
    shift = torch.arange(6.0).view(3, 2)[labels]
    torch.testing.assert_close(pairs['x_0'], pairs['eps'] - pairs['eps'] @ MATRIX.T - shift)


def test_pairs_do_not_depend_on_batches_nor_on_an_interruption(linear, tmp_path, monkeypatch):
    def run(name, batch_size):
        args = ('--num-pairs', 23, '--nfe', 3, '--shard-size', 4, '--batch-size', batch_size)
        return draw(linear, tmp_path / name, *args, '--dtype', 'fp32')

    whole = everything(run('whole', 4))
    other = everything(run('other', 3))
    assert torch.equal(other['eps'], whole['eps'])
    torch.testing.assert_close(other['x_0'], whole['x_0'])

    write = ShardWriter.write

    def interrupted(self, name, *args, **kwargs):
        if name == self.name(3):
            raise KeyboardInterrupt
        write(self, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, 'write', interrupted)
        with pytest.raises(KeyboardInterrupt):
            run('stopped', 4)
    with pytest.raises(UsageError, match='not a finished cache.*goes on where it stopped'):
        Couplings(str(tmp_path / 'stopped'))
    first = tmp_path / 'stopped' / ShardWriter.name(0)
    before = first.stat().st_mtime_ns
    run('stopped', 4)
    assert first.stat().st_mtime_ns == before
    assert content(tmp_path / 'stopped') == content(tmp_path / 'whole')


@pytest.mark.slow
def test_killed_and_drawn_by_two_processes_is_the_same(tiny, tmp_path):
    """A real kill between shards; then as many processes as there are."""
    args = [tiny / 'teacher.py', tiny / 'teacher_run']
    options = ['--num-pairs', 400, '--nfe', 200, '--batch-size', 8, '--shard-size', 16]
    module = 'mmfgm.tools.draw_couplings'
    out = tmp_path / 'out'
    command = [sys.executable, '-m', module, *map(str, [*args, out, *options])]
    process = subprocess.Popen(
        command, cwd=ROOT, env=tool_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + LIMIT
    while len(list(out.glob('shard_*.json'))) < 3 and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / 'manifest.json').exists()
    options += ['--launcher', 'pytorch']
    result = run_module(module, *args, out, *options, nproc=2)
    assert 'ETA' in result.stdout and '400 pairs in 25 shards' in result.stdout
    draw_couplings([*map(str, [*args, tmp_path / 'whole', *options[:-2]])])
    assert content(out) == content(tmp_path / 'whole')


def test_a_lost_shard_is_named_and_drawn_again(linear, tmp_path):
    args = ('--num-pairs', 6, '--nfe', 2, '--shard-size', 2)
    out = tmp_path / 'out'
    draw(linear, out, *args)
    good = content(out)
    (out / ShardWriter.name(1)).unlink()
    with pytest.raises(UsageError, match='shard_000001.safetensors.* is missing.*run the tool'):
        Couplings(str(out))
    draw(linear, out, *args)
    assert content(out) == good
    changed = bytearray(good[ShardWriter.name(1)])
    changed[-5] ^= 1
    (out / ShardWriter.name(1)).write_bytes(changed)
    with pytest.raises(UsageError, match='shard_000001.safetensors; delete'):
        verify_cache(str(out))


def test_other_settings_do_not_go_on_in_the_same_folder(linear, tmp_path):
    args = ('--num-pairs', 6, '--nfe', 2)
    draw(linear, tmp_path / 'out', *args)
    other = teacher(tmp_path, type='LinearTeacher', num_classes=2)
    for made, more, differs in (
        (linear, ('--nfe', 4), r'settings\.nfe is 2, expected 4'),
        (linear, ('--solver', 'heun'), r"settings\.solver is '?euler"),
        (linear, ('--seed', 2), r'settings\.seed'),
        (linear, ('--num-pairs', 7), r'source\.count is 6, expected 7'),
        (other, (), r'identity\.teacher\.weights'),
    ):
        with pytest.raises(UsageError, match=f'begun with something else: .*{differs}'):
            draw(made, tmp_path / 'out', *args, *more)


def test_what_cannot_be_drawn_is_refused(linear, tmp_path):
    for args, match in (
        (('--num-pairs', 0), '--num-pairs must be at least 1'),
        (('--num-pairs', 4, '--nfe', 3, '--solver', 'heun'), 'NFE must be a positive multiple'),
        (('--num-pairs', 4, '--network', 'generator'), "no network 'generator'"),
        (('--num-pairs', 4, '--guidance', 2.0), 'guidance=2.0 of network_ema needs'),
        (('--num-pairs', 4, '--batch-size', 0), '--batch-size must be at least 1'),
    ):
        with pytest.raises(UsageError, match=match):
            draw(linear, tmp_path / 'out', *args)
    with pytest.raises(UsageError, match='does not exist'):
        draw((linear[0], str(tmp_path / 'none.pth')), tmp_path / 'out', '--num-pairs', 4)
    assert not (tmp_path / 'out').exists()
    far = teacher(tmp_path, type='GaussianTeacher', mean=1e5)
    with pytest.raises(UsageError, match='x_0 reaches 1e.05, which --dtype fp16 cannot hold; use'):
        draw(far, tmp_path / 'far', '--num-pairs', 4, '--nfe', 100)


def test_models_of_prompts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GaussianTeacher, 'num_classes', None)
    made = teacher(tmp_path, type='GaussianTeacher')
    with pytest.raises(UsageError, match='GaussianTeacher takes conditions that are no labels'):
        draw(made, tmp_path / 'out', '--num-pairs', 4)


def training(folder, path, checkpoint, **network):
    """A config that trains on couplings for two iterations."""
    config = folder / 'reflow.py'
    config.write_text(f"""
_base_ = [{str(ROOT / 'configs/_base_/default_runtime.py')!r}]
custom_imports = dict(imports=['{__name__}'])
model = dict(
    type='FlowMatching', network={network!r}, time_sampler=dict(type='Uniform'),
    teacher=dict(checkpoint={checkpoint!r}, prefix='network_ema'))
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='Couplings', path={str(path)!r}))
train_cfg = dict(type='AlternatingTrainLoop', max_iters=2)
optim_wrapper = dict(
    constructor='PerNetworkConstructor', network=dict(optimizer=dict(type='Adam', lr=1e-3)))
work_dir = {str(folder / 'run')!r}
""")
    return [str(config)]


def test_training_takes_couplings_of_its_teacher_alone(linear, tmp_path):
    draw(linear, tmp_path / 'out', '--num-pairs', 8, '--nfe', 2)
    train(training(tmp_path, tmp_path / 'out', linear[1], type='LinearTeacher'))
    state = torch.load(tmp_path / 'run/iter_2.pth', weights_only=False)['state_dict']
    start = torch.load(linear[1])['state_dict']
    # it starts at the teacher's weights, and two steps of Adam at 1e-3 lead no further
    distance = (state['network.matrix'] - start['network_ema.matrix']).abs().max()
    assert 0 < distance < 2.1e-3
    (tmp_path / 'other').mkdir()
    changed = {key: value + 1e-3 for key, value in start.items()}
    torch.save(dict(state_dict=changed), tmp_path / 'other.pth')
    for checkpoint, network, match in (
        (str(tmp_path / 'other.pth'), {}, r'couplings of another teacher.*model\.teacher; draw'),
        (None, dict(num_classes=3), 'couplings without labels, but the model needs them with'),
    ):
        config = training(tmp_path, tmp_path / 'out', checkpoint, type='LinearTeacher', **network)
        with pytest.raises(UsageError, match=match):
            train(config)
    with pytest.raises(UsageError, match=r'shape \(2,\), but the model takes \(1,\)'):
        train(training(tmp_path, tmp_path / 'out', None, type='GaussianTeacher'))


def test_noise_of_the_batch_is_the_noise_of_the_path(tmp_path):
    """At t = 1 alone the loss is the error of x_0 as made from its noise: distillation."""
    with DefaultScope.overwrite_default_scope('mmfgm'):
        model = FlowMatching(dict(type='LinearTeacher'), dict(type='Uniform', low=1.0, high=1.0))
    x_0, eps = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    loss = model.loss('network', dict(x_0=x_0, eps=eps, cond={}))['loss_fm']
    one_step = eps - model.network(eps, torch.ones(5))
    torch.testing.assert_close(loss, (one_step - x_0).square().mean())


def test_a_mirrored_pair_is_mirrored_as_a_whole():
    x_0, eps = torch.randn(2, 64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    out = ImagePreprocessor(flip_prob=0.5)(dict(x_0=x_0, eps=eps), training=True)
    flipped = (out['x_0'] != x_0).flatten(1).any(1)
    assert 10 < flipped.sum() < 54
    assert torch.equal(out['eps'][flipped], eps[flipped].flip(-1))
    assert torch.equal(out['eps'][~flipped], eps[~flipped])


def test_noise_that_is_not_finite_is_refused():
    batch = dict(idx=torch.tensor([3, 4]), x_0=torch.zeros(2, 2), eps=torch.zeros(2, 2), cond={})
    batch['eps'][1, 0] = float('nan')
    with pytest.raises(NonFiniteError, match='eps of the training data.*item 4'):
        check_finite_batch(batch, SimpleNamespace())


def straightness(velocity, eps, steps=50):
    """``E int |(eps - x_0) - v(x_t, t)|^2 dt`` (Liu et al., 2022): 0 where paths are straight."""
    times, xs = uniform_times(steps), [eps]
    x_0 = euler(velocity, eps, times, lambda i, x, t: xs.append(x))
    velocities = [velocity(x, t.expand(len(x))) for x, t in zip(xs, times[:-1])]
    return torch.stack([(eps - x_0 - v).square().mean() for v in velocities]).mean()


def test_reflow_makes_paths_straighter(tmp_path):
    made = teacher(tmp_path, type='GaussianTeacher')
    cache = draw(made, tmp_path / 'out', '--num-pairs', 2000, '--nfe', 100)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmfgm'):
        model = FlowMatching(
            dict(type='AdaLNMLP', event_shape=(1,), width=32, depth=2, max_frequency=4.0),
            dict(type='Uniform'),
        )
    pairs = everything(cache)
    optimizer = torch.optim.Adam(model.network.parameters(), lr=5e-3)
    for _ in range(300):
        rows = torch.randint(0, len(cache), (256,))
        batch = dict(x_0=pairs['x_0'][rows], eps=pairs['eps'][rows], cond={})
        optimizer.zero_grad()
        model.loss('network', batch)['loss_fm'].backward()
        optimizer.step()
    eps = torch.randn(2000, 1)
    with torch.no_grad():
        before, after = (straightness(v, eps).item() for v in (GaussianTeacher(), model.network))
        one_step = eps - model.network(eps, torch.ones(2000))
    assert after < before / 10, (before, after)
    # one step of it lands where the teacher's hundred do: N(2, 0.1^2)
    assert one_step.mean().item() == pytest.approx(2.0, abs=0.05)
    assert one_step.std().item() == pytest.approx(0.1, abs=0.05)


def test_manifest_says_what_was_drawn(linear, tmp_path):
    draw(linear, tmp_path / 'out', '--num-pairs', 5, '--nfe', 6, '--solver', 'heun')
    manifest = json.loads((tmp_path / 'out/manifest.json').read_text())
    settings = manifest['settings']
    assert manifest['kind'] == 'couplings' and manifest['count'] == 5
    assert (settings['network'], settings['nfe'], settings['solver']) == ('network_ema', 6, 'heun')
    assert set(manifest['identity']['teacher']) == {'weights'}
