# Copyright (c) mmfgm authors.
import itertools
import json
import time
from unittest.mock import patch

import pytest
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, DefaultScope
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.profiler import profile

from mmfgm.apis import read_config
from mmfgm.apis.rehearsal import (
    GPUS,
    Memory,
    Message,
    Traffic,
    Work,
    bare_runner,
    build_without_weights,
    feed,
    gpu_named,
    rehearse,
)
from mmfgm.engine import FlowRunner
from mmfgm.engine.adam import MomentumFreeAdam
from mmfgm.errors import UsageError
from mmfgm.models.networks import AdaLNMLP
from mmfgm.registry import MODELS
from mmfgm.tools.rehearse import rehearse_tool, share_batch
from tests.conftest import ROOT, train
from tests.family_checks import TINY

DIGITS = ROOT / 'configs/fgm/digits.py'
SD3_1024 = ROOT / 'configs/fgm/sd3_1024.py'
BATCH, LATENT, CHANNELS, LAYERS, HEADS, HEAD_DIM, JOINT, POOLED = 3, 8, 16, 3, 4, 8, 32, 64
WIDTH = HEADS * HEAD_DIM
SD3 = dict(
    type='SD3',
    latent_size=LATENT,
    config=dict(
        sample_size=LATENT,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=JOINT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=LATENT,
    ),
)
SMALL = dict(width=16, depth=2, embed_dim=16)


def digits(**options):
    """The digits run without a teacher to read."""
    return read_config(str(DIGITS), {'model.teacher.checkpoint': None, **options})


def tiny_sd3(network, **options):
    """SD3's run with a tiny network."""
    cfg = read_config(
        str(SD3_1024), {'latent_size': LATENT, 'train_dataloader.batch_size': BATCH, **options}
    )
    cfg.model.network = network
    return cfg


def sd3_flops(backward):
    """Of one call by hand: 2 for each weight and token; with ``backward``, the gradients of the
    weights and of inputs that depend on weights beside it. Attention is two products of scores
    forward, and five backward, where the scores are computed again."""
    tokens, text, patch = (LATENT // 2) ** 2, 333, 4 * CHANNELS
    first = BATCH * (
        tokens * patch * WIDTH + (256 + POOLED) * WIDTH + text * JOINT * WIDTH
    )  # inputs need no gradient
    linear = BATCH * (2 * WIDTH**2 + 2 * WIDTH**2 + tokens * WIDTH * patch)
    attention = 0
    for layer in range(LAYERS):
        last = layer == LAYERS - 1
        linear += BATCH * WIDTH**2 * (6 + (2 if last else 6))  # modulation of image and text
        linear += BATCH * WIDTH**2 * tokens * (4 + 8)
        linear += BATCH * WIDTH**2 * text * (3 if last else 4 + 8)
        attention += BATCH * (tokens + text) ** 2 * WIDTH
    forward = 2 * (first + linear + 2 * attention)
    return forward + (2 * (first + 2 * linear + 5 * attention) if backward else 0)


def test_flops_are_those_counted_by_hand():
    cfg = tiny_sd3(SD3, **{'model.gan': None, 'strategy.precision': 'fp32'})
    cfg.model.guidance = None
    del cfg.optim_wrapper['discriminator']
    found = rehearse(cfg, gpus=2)
    assert found.accumulation == 6
    # the generator makes samples, the online network learns from them
    expected = 6 * (sd3_flops(backward=False) + sd3_flops(backward=True))
    assert found.phases['online'].tflop * 1e12 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    'sharing, passes, phases',
    [
        ({}, 11, ['online', 'generator']),
        ({'train_cfg.share_samples': True}, 10, ['generator', 'online']),
        (
            {'train_cfg.share_velocity': True, 'model.fgm_time_sampler.mean': 0.5},
            9,
            ['generator and online'],
        ),
    ],
)
def test_each_pass_of_a_cycle_is_counted(sharing, passes, phases):
    """In forwards, of which a backward pass is two, one of them the gradient of weights: 3 to learn
    the flow, 3 for teacher and online network beside the path, 2 back through them, 2 through the
    generator, and one for each time that it makes samples; one less where one forward of the online
    network serves both."""
    found = rehearse(digits(**sharing), gpus=1).phases
    assert list(found) == phases
    teacher = read_config(str(ROOT / 'configs/reflow/digits.py'))
    # a step of pre-training is a forward and a backward pass; the first layer's input needs none
    unit = sum(cost.tflop for cost in rehearse(teacher, gpus=1).phases.values()) / 3
    assert sum(cost.tflop for cost in found.values()) / unit == pytest.approx(passes, rel=0.05)


RECIPES = dict(
    sd3='sd3_1024',
    sd35='sd3_1024',
    sana='sana_1024',
    lumina2='lumina2_1024',
    flux='flux_1024',
    flux2='flux2_klein_1024',
    qwen_image='qwen_image_1024_lora',
    z_image='z_image_1024',
)


@pytest.mark.slow
@pytest.mark.parametrize('family', TINY)
def test_a_real_iteration_of_each_family_computes_as_much(family, tmp_path):
    """Of prompts without padding; parts that read values, as masks are counted, included."""
    cfg = read_config(
        str(ROOT / f'configs/fgm/{RECIPES[family]}.py'),
        {
            'pretrained': TINY[family](tmp_path / 'base'),
            'latent_size': 8,
            'train_cfg.accumulation': 1,
            'train_dataloader.batch_size': 2,
            'model.gan': None,
            'optim_wrapper.discriminator': None,
        },
    )
    cfg.strategy = dict(precision='fp32')
    cfg.train_dataloader.dataset.real.latent_shape = None
    found = rehearse(cfg, gpus=1)
    with DefaultScope.overwrite_default_scope('mmfgm'):
        model = build_without_weights(cfg, 'cpu')
    runner = bare_runner(cfg, model, str(tmp_path / 'run'), 'none')
    runner.prepare()
    feed(runner, cfg)
    with Work() as work:
        runner.train_loop.run_iter()
    assert sum(cost.tflop for cost in found.phases.values()) * 1e12 == pytest.approx(work.flops)


def test_a_collectives_time_is_that_of_its_ring():
    sheet = gpu_named('H100-80GB')
    link, network = 0.7 * 450e9, 0.7 * 50e9
    # in one machine: 7/8 of the message, 7 hops
    assert Message('all_gather', 8, 1, 10**9).seconds(sheet) == pytest.approx(
        7 / 8 * 1e9 / link + 8.4e-6 + 7 * 3.4e-6
    )
    # over four machines with eight cards each, which together are slower than the link
    assert Message('reduce_scatter', 32, 4, 10**9).seconds(sheet) == pytest.approx(
        31 / 32 * 1e9 / (8 * network) + 8.4e-6 + 28 * 3.4e-6 + 3 * 14e-6
    )
    # one process of each machine, around twice
    assert Message('all_reduce', 4, 4, 10**9).seconds(sheet) == pytest.approx(
        2 * 3 / 4 * 1e9 / network + 8.4e-6 + 6 * 14e-6
    )


def test_copies_are_gathered_in_a_machine_and_summed_between():
    cfg = digits()
    cfg.model.network.update(SMALL)
    cfg.strategy = dict(type='FSDP2Strategy', block_types=('AdaLNBlock',), shard_size=4)
    groups = []
    seconds = Message.seconds
    with patch.object(Message, 'seconds', lambda m, gpu: groups.append(m) or seconds(m, gpu)):
        found = rehearse(cfg, 8, 'H100-80GB', per_machine=4)
    kinds = {(m.name, m.members, m.machines) for m in groups}
    norms = ('all_reduce', 4, 1)  # over the shards
    assert kinds - {norms} == {
        ('all_gather', 4, 1),
        ('reduce_scatter', 4, 1),
        ('all_reduce', 2, 2),
    }
    assert max(m.size for m in groups if m[:3] == norms) < 1000
    whole = digits(strategy=dict(type='FSDP2Strategy', block_types=('AdaLNBlock',)))
    whole.model.network.update(SMALL)
    for name, cost in rehearse(whole, 8, 'H100-80GB', per_machine=4).phases.items():
        assert cost.link_seconds > found.phases[name].link_seconds


def local_bytes(params, gpus):
    return sum(
        4 * -(-len(p) // gpus) * p[:1].numel() if gpus > 1 else 4 * p.numel() for p in params
    )


@pytest.mark.parametrize('gpus', [1, 2])
def test_states_are_counted_exactly(gpus):
    cfg = digits(**{'train_cfg.accumulation': 2, 'train_cfg.share_samples': False})
    cfg.model.network.update(SMALL)
    cfg.optim_wrapper.generator.optimizer = dict(type='MomentumFreeAdam', lr=1e-3)
    if gpus > 1:
        cfg.strategy = dict(type='FSDP2Strategy', block_types=('AdaLNBlock',))
    found = rehearse(cfg, gpus)
    network = MODELS.build(cfg.model.network)
    params = list(network.parameters())
    states, steps = local_bytes(params, gpus), 4 * len(params)
    buffers = sum(b.nbytes for b in network.buffers())
    for cost in found.phases.values():
        kinds = cost.peak_bytes
        assert kinds['parameters'] == 3 * (states + buffers)
        assert kinds['averages'] == states + buffers
        # Adam's two moments and MomentumFreeAdam's one
        assert kinds['optimizer'] == 3 * states + 2 * steps
        assert kinds['gradients'] == states
        assert kinds['activations'] > 0


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storages(tensors):
    """Bytes of what is there, each storage once."""
    found = (local(x).untyped_storage() for x in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def finished(collective):
    """The collective, and time for gloo's threads to let go of its tensors: they hold them for a
    moment longer than a stream of a GPU would."""

    def run(*args, **kwargs):
        work = collective(*args, **kwargs)
        if work is not None:
            work.wait()
        time.sleep(0.01)
        return work

    return run


@HOOKS.register_module()
class MemoryHook(Hook):
    """Write the bytes that each phase of a real iteration takes, by kind as far as tensors last,
    and in all as torch's allocator counts them; the least of those after the first, when optimizers
    have states."""

    def before_train(self, runner):
        if get_world_size() > 1:
            for name in ('all_gather_into_tensor', 'reduce_scatter_tensor'):
                setattr(torch.distributed, name, finished(getattr(torch.distributed, name)))
        found, peaks, updates = {}, {}, runner.train_loop._update
        for wrapper in runner.optim_wrapper.values():
            wrapper.optimizer.register_step_pre_hook(lambda *args: self.count_gradients(runner))

        def measured(phase, shared):
            self.gradients = 0
            start = sum(self.lasting(runner).values())
            with profile(profile_memory=True) as events:
                updates(phase, shared)
            changes = sorted(
                (event.start_ns(), event.nbytes())
                for event in events.profiler.kineto_results.events()
                if event.name() == '[memory]'
            )
            there = itertools.accumulate(change for _, change in changes)
            peaks.setdefault(phase, []).append(start + max(there))
            found[phase] = dict(
                self.lasting(runner),
                gradients=self.gradients,
                peak=min(peaks[phase][1:], default=None),
            )
            with open(f'{runner.work_dir}/memory_{get_rank()}.json', 'w') as f:
                json.dump(found, f)

        runner.train_loop._update = measured

    def count_gradients(self, runner):
        grads = [p.grad for p in runner.model.parameters() if p.grad is not None]
        self.gradients = max(self.gradients, storages(grads))

    def lasting(self, runner):
        networks = runner.model.networks.items()
        averages = set(runner.model.ema_decays)
        trained, averaged = (
            [
                tensor
                for name, network in networks
                if (name in averages) == kind
                for tensor in (*network.parameters(), *network.buffers())
            ]
            for kind in (False, True)
        )
        parameters = storages(trained)
        states = [
            value
            for wrapper in runner.optim_wrapper.values()
            for state in wrapper.optimizer.state.values()
            for value in state.values()
        ]
        # weights under adapters are shared with the averages
        return dict(
            parameters=parameters,
            averages=storages([*trained, *averaged]) - parameters,
            optimizer=storages(states),
        )


KINDS = ('parameters', 'averages', 'gradients', 'optimizer')


@pytest.mark.parametrize(
    'lora', [None, dict(rank=8, alpha=8, target_modules=('mlp.0', 'mlp.2'))], ids=['all', 'LoRA']
)
def test_memory_is_what_a_run_takes(lora, tmp_path):
    """The second micro-batch of an update is its peak: it finds the gradients of the first."""
    cfg = digits(
        **{
            'train_cfg.max_iters': 2,
            'train_cfg.accumulation': 2,
            'train_cfg.share_samples': False,
            'evaluations.fd.interval': 0,
            'default_hooks.samples': None,
            'default_hooks.memory': dict(type='MemoryHook'),
            'work_dir': str(tmp_path),
        }
    )
    cfg.model.lora = lora
    cfg.model.ema = dict(generator_ema=0.9, generator_ema_slow=0.99)
    cfg.optim_wrapper.generator.optimizer = dict(type='MomentumFreeAdam', lr=1e-3)
    found = rehearse(cfg, gpus=1)
    FlowRunner.from_cfg(cfg).train()
    measured = json.load(open(tmp_path / 'memory_0.json'))
    assert measured.keys() == found.phases.keys()
    for phase, cost in found.phases.items():
        for kind in KINDS:
            assert cost.peak_bytes[kind] == measured[phase][kind] > 0
        assert cost.peak_bytes['gathered/cast'] == 0
        assert cost.peak == pytest.approx(measured[phase]['peak'], rel=0.01)


@pytest.mark.slow
def test_memory_is_what_a_sharded_run_takes(tmp_path):
    """The gathered blocks too, which are the larger part of what does not last here. Gloo holds up
    to two blocks' buffers longer than the rehearsal, as its threads happen to run, so the least of
    all iterations and processes counts."""
    path = tmp_path / 'run.py'
    path.write_text(f"""
_base_ = [{str(DIGITS)!r}]
model = dict(teacher=dict(checkpoint=None), network=dict(width=256, depth=4, embed_dim=64))
strategy = dict(type='FSDP2Strategy', block_types=('AdaLNBlock',))
train_cfg = dict(max_iters=8, accumulation=2, share_samples=False)
train_dataloader = dict(batch_size=2)
evaluations = dict(fd=dict(interval=0))
default_hooks = dict(samples=None, memory=dict(type='MemoryHook'))
custom_imports = dict(imports=['tests.test_tools.test_rehearse'])
""")
    train(path, tmp_path, nproc=2)
    measured = [json.load(open(tmp_path / f'memory_{rank}.json')) for rank in range(2)]
    found = rehearse(read_config(str(path)), gpus=2)
    assert measured[0].keys() == found.phases.keys()
    for phase, cost in found.phases.items():
        for kind in KINDS:
            assert cost.peak_bytes[kind] == measured[0][phase][kind] > 0
        gathered = cost.peak_bytes['gathered/cast']
        assert gathered > 2 * cost.peak_bytes['activations']
        more = min(each[phase]['peak'] for each in measured) - cost.peak
        # of the whole; and of what is gathered, where gloo lets go in time
        assert -0.01 * gathered < more < 0.1 * cost.peak
        if phase == 'online':
            assert more < 0.1 * gathered


@HOOKS.register_module()
class TrafficHook(Hook):
    """Write what an iteration of a real run sends; the third, as DDP orders its buckets before."""

    def before_train(self, runner):
        loop, update = runner.train_loop, runner.train_loop._update
        found = {}

        def counted(phase, shared):
            with Traffic() as traffic:
                update(phase, shared)
            found[phase] = dict(traffic.bytes)
            with open(f'{runner.work_dir}/traffic.json', 'w') as f:
                json.dump(found, f)

        loop._update = counted


@pytest.mark.slow
@pytest.mark.parametrize(
    'strategy, processes',
    [
        (dict(type='DDPStrategy'), 2),
        (dict(type='FSDP2Strategy', block_types=('AdaLNBlock',)), 2),
        (dict(type='FSDP2Strategy', block_types=('AdaLNBlock',), shard_size=2), 4),
    ],
    ids=['DDP', 'FSDP2', 'HSDP'],
)
def test_traffic_is_what_processes_send(strategy, processes, tmp_path):
    """Of two micro-batches; copies of the weights are summed over in the second alone."""
    path = tmp_path / 'run.py'
    path.write_text(f"""
_base_ = [{str(DIGITS)!r}]
model = dict(teacher=dict(checkpoint=None), network=dict(width=16, depth=2, embed_dim=16))
strategy = {strategy}
train_cfg = dict(max_iters=3, accumulation=2, share_samples=False)
train_dataloader = dict(batch_size=8)
evaluations = dict(fd=dict(interval=0))
default_hooks = dict(samples=None, traffic=dict(type='TrafficHook'))
custom_imports = dict(imports=['tests.test_tools.test_rehearse'])
""")
    train(path, tmp_path, nproc=processes)
    sent = json.load(open(tmp_path / 'traffic.json'))
    found = rehearse(read_config(str(path)), gpus=processes)
    assert {name: cost.traffic_bytes for name, cost in found.phases.items()} == sent
    assert all(size > 0 for phase in sent.values() for size in phase.values())


@MODELS.register_module()
class MixedMLP(AdaLNMLP):
    """One of its layers is of another type than what it is given."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks[1].to(torch.bfloat16)


def test_mixed_types_are_named():
    cfg = digits(**{'model.network.type': 'MixedMLP'})
    with pytest.raises(UsageError) as e:
        rehearse(cfg, gpus=1)
    message = str(e.value)
    assert "phase 'online', layer generator.network.blocks.1" in message
    assert 'dtype' in message and 'networks/mlp.py:' in message


def forgetful(group):
    """How older versions of FSDP2 settle the types of gradients (pytorch#186998)."""
    for param in group.fsdp_params:
        param.init_dtype_attrs(group.mp_policy)
    trained = any(param.sharded_param.requires_grad for param in group.fsdp_params)
    group._orig_dtype = torch.float32 if trained else None
    group._reduce_dtype = torch.float32 if trained else None


def test_a_network_that_is_frozen_when_it_first_runs_is_named(monkeypatch):
    monkeypatch.setattr(FSDPParamGroup, '_init_mp_dtypes', forgetful)
    cfg = digits(**{'train_cfg.share_samples': True})
    cfg.strategy = dict(type='FSDP2Strategy', block_types=('AdaLNBlock',), precision='bf16')
    with pytest.raises(UsageError, match=r'online\S* to be reduced in torch.float32.*first ran'):
        rehearse(cfg, gpus=2)
    cfg.train_cfg.share_samples = False
    assert rehearse(cfg, gpus=2).phases['online'].traffic_bytes['reduce_scatter'] > 0


@MODELS.register_module()
class FrozenMLP(AdaLNMLP):
    """A user froze all of it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.requires_grad_(False)


def test_a_frozen_network_is_named():
    with pytest.raises(UsageError, match="phase 'online'.*does not require grad"):
        rehearse(digits(**{'model.network.type': 'FrozenMLP'}), gpus=1)


def test_rehearsals_of_one_second_share_nothing(monkeypatch):
    # MMEngine names loggers and visualizers by the second, and a rehearsal removes its folder
    monkeypatch.setattr(time, 'time', lambda: 0.0)
    assert rehearse(digits(), gpus=1).phases == rehearse(digits(), gpus=1).phases


def test_latents_that_do_not_fit_the_network_are_named():
    cfg = tiny_sd3(SD3)
    cfg.train_dataloader.dataset.real.latent_shape = (CHANNELS, 2 * LATENT, 2 * LATENT)
    with pytest.raises(UsageError, match=r"a run would fail in phase 'online'.*Sizes of tensors"):
        rehearse(cfg, gpus=2)


def test_labels_without_values_pass_the_checks_of_networks():
    network = dict(
        type='UNetVelocity',
        unet=dict(
            type='EDMUNet',
            img_resolution=8,
            in_channels=1,
            out_channels=1,
            label_dim=10,
            model_channels=8,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
        ),
    )
    cfg = digits()
    cfg.model.network = network
    assert rehearse(cfg, gpus=1).phases['generator'].tflop > 0


def test_momentum_free_adam_steps_without_values():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.zeros(3)
        optimizer = MomentumFreeAdam([p])
        optimizer.step()
        assert optimizer.state[p]['exp_avg_sq'].shape == (3,)


def test_roofline_of_a_product_and_a_sum():
    n, gpu = 512, GPUS['H100-80GB']
    a = torch.zeros(n, n)
    with Work(gpu) as work:
        a @ a
    assert work.flops == 2 * n**3
    moved = 3 * a.nbytes / (3350e9 * 0.8)
    assert work.seconds == pytest.approx(max(2 * n**3 / (67e12 * 0.5), moved))
    with Work(gpu) as work:
        a + a
    assert work.flops == 0 and work.seconds == pytest.approx(2 / 3 * moved, rel=0.51)


def test_peak_is_when_most_is_there():
    memory = Memory()
    with memory:
        start = memory.mark()
        a = torch.zeros(100)
        b = torch.zeros(50)
        del a
        c = torch.zeros(60)
        middle = memory.mark()
        del b, c
    assert memory.peak(start, middle)['activations'] == 4 * 150
    assert memory.peak(middle, memory.mark())['activations'] == 4 * 60


def test_a_gpu_that_is_too_small_and_json(tmp_path, capsys, monkeypatch):
    from mmfgm.apis.rehearsal import gpus

    monkeypatch.setitem(GPUS, 'L40S-48GB', gpus.GPU(1.08, 362, 183, 91.6, 864, 32, 'PCIe'))
    with pytest.raises(SystemExit) as e:
        rehearse_tool([str(DIGITS), '--gpu', 'L40S-48GB', '--json', str(tmp_path / 'found.json')])
    out = capsys.readouterr().out
    assert e.value.code == 1 and 'do NOT fit' in out and '- batch: ' in out
    found = json.loads((tmp_path / 'found.json').read_text())
    assert (
        found['fits'] is False
        and found['iterations'] == read_config(str(DIGITS)).train_cfg.max_iters
    )
    assert found['days'] == pytest.approx(
        found['iterations'] / 86400 * sum(p['compute_seconds'] for p in found['phases'].values())
    )


def test_total_batch():
    assert share_batch(192, 8, 4) == (4, 6)
    assert share_batch(192, 64, 4) == (3, 1)
    with pytest.raises(UsageError, match='at most the --total-batch of 192'):
        share_batch(192, 256, 4)
    with pytest.raises(UsageError, match='multiple of 20'):
        share_batch(192, 5, 4)


def test_bad_input():
    with pytest.raises(UsageError, match="one of A100-40GB, .*, found 'H100'"):
        rehearse_tool([str(DIGITS), '--gpu', 'H100'])
    with pytest.raises(UsageError, match='SingleDeviceStrategy'):
        cfg = digits()
        cfg.strategy = dict(type='SingleDeviceStrategy')
        rehearse(cfg, gpus=2)
    cfg = tiny_sd3(dict(type='SD3', latent_size=8, pretrained='someone/else'))
    with pytest.raises(UsageError, match=r'stable-diffusion-3-medium-diffusers.*does not ask the'):
        rehearse(cfg, gpus=2)
