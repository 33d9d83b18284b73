# Copyright (c) mmfgm authors.
"""Estimates of memory are what a run on the CPU really takes, where that can be measured."""

import json
import resource

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from torch.distributed.tensor import DTensor

from mmfgm.apis import read_config
from mmfgm.apis.memory import build_on_meta, dummy_batch, estimate, kept_bytes
from mmfgm.engine import FlowRunner
from mmfgm.errors import UsageError
from mmfgm.registry import HOOKS, MODELS
from mmfgm.tools.estimate_memory import estimate_memory, gpu_gib
from tests.conftest import ROOT, run_module, train

DIGITS = ROOT / 'configs/fgm/digits.py'
CIFAR10 = ROOT / 'configs/fgm/cifar10_uncond.py'


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd saves, each storage once, without the tensors in ``weights``."""

    def __init__(self, weights):
        self.weights, self.storages = {w.untyped_storage().data_ptr() for w in weights}, {}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage
        return tensor

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@HOOKS.register_module()
class MeasureHook(Hook):
    """Write the bytes that tensors of each kind take on this process."""

    def before_train(self, runner):
        self.gradients, self.activations = 0, {}
        for wrapper in runner.optim_wrapper.values():
            wrapper.optimizer.register_step_pre_hook(lambda *args: self.measure_gradients(runner))
        loop, update = runner.train_loop, runner.train_loop._update

        def measured(phase, shared):
            saved = Saved([*map(local, runner.model.parameters()), *runner.model.buffers()])
            with saved:
                update(phase, shared)
            self.activations[phase] = saved.bytes()

        loop._update = measured

    def measure_gradients(self, runner):
        self.gradients = max(
            self.gradients, size(p.grad for p in runner.model.parameters() if p.grad is not None)
        )

    def after_train(self, runner):
        kinds, seen = dict(parameters=0, EMA=0), set()
        for name, network in runner.model.networks.items():
            kind = 'EMA' if name in runner.model.ema_decays else 'parameters'
            own = [
                tensor
                for tensor in (*network.parameters(), *network.buffers())
                if id(tensor) not in seen
            ]
            kinds[kind] += size(own)
            seen.update(map(id, own))
        states = [
            state for w in runner.optim_wrapper.values() for state in w.optimizer.state.values()
        ]
        kinds.update(
            gradients=self.gradients,
            optimizer=sum(size(state.values()) for state in states),
            activations=self.activations,
        )
        with open(f'{runner.work_dir}/rank_{get_rank()}.json', 'w') as f:
            json.dump(kinds, f)


@pytest.fixture
def config(tmp_path):
    """The digits run of one iteration, with an optimizer of each kind and no teacher to read."""
    path = tmp_path / 'run.py'
    path.write_text(f"""
_base_ = [{str(DIGITS)!r}]
model = dict(teacher=dict(checkpoint=None), ema=dict(generator_ema=0.9, generator_ema_slow=0.99))
train_cfg = dict(max_iters=1)
optim_wrapper = dict(
    generator=dict(optimizer=dict(_delete_=True, type='MomentumFreeAdam', lr=1e-3)))
evaluations = dict(fd=dict(interval=0))
default_hooks = dict(samples=None, measure=dict(type='MeasureHook'))
custom_imports = dict(imports=['tests.test_tools.test_estimate_memory'])
""")
    return path


@pytest.mark.parametrize(
    'lora, least',
    [(None, 1e6), (dict(rank=8, alpha=8, target_modules=('mlp.0', 'mlp.2')), 1e5)],
    ids=['all weights', 'LoRA'],
)
def test_estimate_is_what_a_run_takes(config, lora, least, tmp_path):
    cfg = read_config(str(config))
    cfg.model.lora = lora
    memory = estimate(cfg, gpus=1)
    cfg.work_dir = str(tmp_path)
    FlowRunner.from_cfg(cfg).train()
    measured = json.load(open(tmp_path / 'rank_0.json'))
    activations = measured.pop('activations')
    assert {kind: memory.totals[kind] for kind in measured} == measured
    assert min(measured.values()) > least
    assert memory.phase == max(activations, key=activations.get) == 'generator'
    assert memory.totals['activations'] == pytest.approx(activations['generator'], rel=0.15)
    assert memory.totals['gathered/cast'] == 0
    assert memory.total == sum(memory.totals.values())


@pytest.mark.slow
def test_shards_are_what_a_sharded_run_takes(config, tmp_path):
    options = ('strategy.type=FSDP2Strategy', 'strategy.block_types=AdaLNBlock,')
    train(config, tmp_path, *options, nproc=2)
    ranks = [json.load(open(tmp_path / f'rank_{rank}.json')) for rank in range(2)]
    cfg = read_config(str(config))
    whole = estimate(cfg, gpus=1)
    cfg.strategy = dict(type='FSDP2Strategy', block_types=('AdaLNBlock',))
    memory = estimate(cfg, gpus=2)
    for kind in ('parameters', 'gradients', 'optimizer', 'EMA'):
        assert memory.totals[kind] == max(rank[kind] for rank in ranks)
        assert memory.totals[kind] < 0.51 * whole.totals[kind]
    # two blocks and what is outside of blocks; one block's gradients, and the same again for their
    # reduction
    network = MODELS.build(cfg.model.network)
    block, rest = (
        sum(p.numel() for p in part)
        for part in (
            network.blocks[0].parameters(),
            (p for name, p in network.named_parameters() if not name.startswith('blocks')),
        )
    )
    assert memory.totals['gathered/cast'] == 4 * (rest + 2 * block) + 8 * max(block, rest)


UNET = dict(
    type='UNetVelocity',
    unet=dict(
        type='EDMUNet',
        img_resolution=16,
        in_channels=3,
        out_channels=3,
        label_dim=10,
        model_channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(16, 8),
        dropout=0.0,
    ),
)
SD3 = dict(
    type='SD3',
    latent_size=8,
    config=dict(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    ),
)


def fgm(network, **kwargs):
    return Config(
        dict(
            model=dict(
                **kwargs,
                type='FGM',
                network=network,
                teacher=dict(checkpoint='none.pth'),
                fm_time_sampler=dict(type='Uniform'),
                fgm_time_sampler=dict(type='Uniform'),
            ),
            train_dataloader=dict(batch_size=6),
            optim_wrapper=dict(
                online=dict(optimizer=dict(type='SGD', lr=0.1)),
                generator=dict(optimizer=dict(type='Adam', lr=0.1)),
            ),
        )
    )


GAN = dict(
    gan=dict(time_sampler=dict(type='Uniform'), head=dict(type='ConvDiscriminator', channels=8))
)


@pytest.mark.parametrize(
    'network, more',
    [(UNET, {}), (SD3, {}), (SD3, GAN)],
    ids=['U-Net', 'SD3', 'SD3 with a GAN'],
)
def test_activations_are_what_autograd_keeps(network, more):
    cfg = fgm(network, **more)
    init_default_scope('mmfgm')
    found = kept_bytes(build_on_meta(cfg), 6, bf16=False, sharded=False)
    cfg.model.teacher.checkpoint = None
    model = MODELS.build(cfg.model)
    batch = dummy_batch(model.teacher, 6)
    for phase, spec in model.phases.items():
        model.requires_grad_(True).teacher.requires_grad_(False)
        model.generator_ema.requires_grad_(False)
        for name in spec.freezes:
            getattr(model, name).requires_grad_(False)
        saved = Saved([*model.parameters(), *model.buffers()])
        with saved:
            losses = model.loss(phase, model.prepare(batch, spec.differentiable))
        assert losses and found[phase] == (pytest.approx(saved.bytes(), rel=0.15), 0)


def test_precision_and_checkpointing():

    def kept(bf16=False, sharded=False, **kwargs):
        return kept_bytes(build_on_meta(fgm(dict(SD3, **kwargs))), 6, bf16, sharded)['generator']

    init_default_scope('mmfgm')
    whole, _ = kept()
    mixed, casts = kept(bf16=True)
    numbers = sum(p.numel() for p in build_on_meta(fgm(SD3)).teacher.parameters())
    # online, teacher and generator, in 2 bytes; biases are not kept, nor what the gradient of
    # frozen networks does not pass
    assert 0.6 * 3 * 2 * numbers < casts <= 3 * 2 * numbers
    assert 0.5 * whole < mixed < whole
    low, casts = kept(bf16=True, sharded=True)
    assert low < mixed and low < 0.7 * whole and casts == 0
    again, _ = kept(checkpointing=True)
    assert whole / 3 / 4 < again < whole / 2


def test_nothing_is_read_of_a_pretrained_pipeline(tmp_path):
    from diffusers import SD3Transformer2DModel as transformer

    with torch.device('meta'):
        transformer(**SD3['config']).save_config(tmp_path / 'transformer')
    memory = estimate(fgm(dict(type='SD3', latent_size=8, pretrained=str(tmp_path))), gpus=1)
    assert memory.totals == estimate(fgm(SD3), gpus=1).totals
    # SGD keeps nothing
    assert memory.networks['online']['optimizer'] == 0 < memory.networks['generator']['optimizer']


def processor_seconds():
    """Of all child processes that have ended; other work on the machine hardly changes it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_cifar10_without_data_or_weights(tmp_path):
    start = processor_seconds()
    result = run_module(
        'mmfgm.tools.estimate_memory', CIFAR10, '--gpus', 8, '--gpu', 'H100-80GB', cwd=tmp_path
    )
    assert processor_seconds() - start < 60
    assert '8 GPU(s): DDPStrategy, tf32, batch of 64' in result.stdout and ' fit.' in result.stdout
    for name in ('teacher', 'online', 'generator', 'generator_ema'):
        assert f'{name} 55.7 M' in ' '.join(result.stdout.split())
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_too_small(capsys):
    with pytest.raises(SystemExit) as e:
        estimate_memory([str(DIGITS), '--gpu', '1.02', '--batch-size', '300'])
    out = capsys.readouterr().out
    assert e.value.code == 1 and 'do NOT fit' in out and 'batch of 300' in out
    estimate_memory([str(DIGITS), '--gpu', 'T4-16GB'])
    assert ' fit.' in capsys.readouterr().out


@pytest.mark.parametrize(
    'options, match',
    [
        (['--gpu', 'H900'], 'H100-80GB'),
        (['--gpu', '-3'], 'must be GiB or one of'),
        (['--batch-size', '0'], '--batch-size must be'),
        (['--gpus', '0'], 'on 0 GPU'),
        (
            ['--gpus', '2', '--cfg-options', 'strategy.type=SingleDeviceStrategy'],
            'SingleDeviceStrategy on 2 GPU',
        ),
        (
            ['--cfg-options', 'strategy.type=FSDP2Strategy', 'strategy.block_types=Block,'],
            'matches no layer',
        ),
        (['--cfg-options', 'strategy.precision=fp8'], 'precision must be one of'),
        (['--cfg-options', 'optim_wrapper.online.optimizer.type=Adamant'], 'cannot be built'),
        (['--cfg-options', 'model.network.pretrained=somewhere'], 'not known without its weights'),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(UsageError, match=match):
        estimate_memory([str(DIGITS), *options])


@MODELS.register_module()
class LooksAtValues(torch.nn.Module):
    """A network that cannot do without values: when it is built, or when it is run."""

    event_shape, num_classes = (2,), 0

    def __init__(self, when):
        super().__init__()
        self.layer, self.when = torch.nn.Linear(2, 2), when
        if when == 'built':
            self.layer.weight.sum().item()

    def forward(self, x_t, t):
        if self.layer.weight.sum().item() > 0:
            return self.layer(x_t)


@pytest.mark.parametrize('when', ['built', 'run'])
def test_a_network_that_looks_at_values(when):
    with pytest.raises(UsageError, match=f'cannot be {when} on'):
        estimate(fgm(dict(type='LooksAtValues', when=when)), gpus=1)


def test_a_network_of_unknown_conditions():
    with pytest.raises(UsageError, match='dummy_conditions'):
        dummy_batch(torch.nn.Linear(1, 1), 2)
    assert gpu_gib('12.5') == 12.5
