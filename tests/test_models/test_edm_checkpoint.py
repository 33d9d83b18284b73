# Copyright (c) mmfgm authors.
"""Networks in EDM's pickle format, written here after its description, and files that pretend to be
one."""

import hashlib
import json
import math
import os
import pickle
import random
import re
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mmfgm.errors import NonFiniteInputError, UsageError
from mmfgm.models import load_network
from mmfgm.models.edm_checkpoint import GLOBALS, read_edm_pickle
from mmfgm.models.networks import EDMUNet
from mmfgm.tools.convert_edm import main

CONDITIONAL = dict(
    img_resolution=8,
    in_channels=3,
    out_channels=3,
    label_dim=5,
    augment_dim=9,
    model_channels=4,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[8],
    dropout=0.13,
)
UNCONDITIONAL = {
    **CONDITIONAL,
    'in_channels': 1,
    'out_channels': 2,
    'label_dim': 0,
    'augment_dim': 0,
    'channel_mult': [2, 1, 3],
    'num_blocks': 2,
    'attn_resolutions': [4],
    'dropout': 0.0,
}
MARKER = 'attacked'
MODULE_SRC = f'open({MARKER!r}, "w").close()\nclass EDMPrecond:\n    pass\n'


def network_shapes(unet):
    """Name to shape of every tensor of a DDPM++ network, by the description and not by our
    class."""
    c, r, attention = unet['model_channels'], unet['img_resolution'], unet['attn_resolutions']
    emb, skips = 4 * c, [c]
    weights = {
        'map_layer0': (emb, c),
        'map_layer1': (emb, emb),
        f'enc.{r}x{r}_conv': (c, unet['in_channels'], 3, 3),
    }
    weights.update(
        {
            f'map_{name}': (c, unet[f'{name}_dim'])
            for name in ('label', 'augment')
            if unet[f'{name}_dim']
        }
    )

    def add(name, c_in, c_out, attention=False, resample=False):
        block = dict(
            norm0=(c_in,),
            conv0=(c_out, c_in, 3, 3),
            affine=(c_out, emb),
            norm1=(c_out,),
            conv1=(c_out, c_out, 3, 3),
        )
        block.update(dict(skip=(c_out, c_in, 1, 1)) if resample or c_in != c_out else {})
        block.update(
            dict(norm2=(c_out,), qkv=(3 * c_out, c_out, 1, 1), proj=(c_out, c_out, 1, 1))
            if attention
            else {}
        )
        weights.update({f'{name}.{key}': shape for key, shape in block.items()})

    levels = [(r >> i, c * mult) for i, mult in enumerate(unet['channel_mult'])]
    for r, width in levels:
        if r != unet['img_resolution']:
            add(f'enc.{r}x{r}_down', c, c, resample=True)
            skips.append(c)
        for i in range(unet['num_blocks']):
            add(f'enc.{r}x{r}_block{i}', c, width, attention=r in attention)
            c = width
            skips.append(c)
    for r, width in levels[::-1]:
        lowest = r == levels[-1][0]
        for name in ('in0', 'in1') if lowest else ('up',):
            add(f'dec.{r}x{r}_{name}', c, c, attention=name == 'in0', resample=not lowest)
        for i in range(unet['num_blocks'] + 1):
            add(
                f'dec.{r}x{r}_block{i}',
                c + skips.pop(),
                width,
                attention=i == unet['num_blocks'] and r in attention,
            )
            c = width
    weights.update(
        {f'dec.{r}x{r}_aux_norm': (c,), f'dec.{r}x{r}_aux_conv': (unet['out_channels'], c, 3, 3)}
    )
    resampling = [name for name in weights if re.search(r'_(down|up)\.(conv0|skip)', name)]
    return {
        **{f'{name}.weight': shape for name, shape in weights.items()},
        **{f'{name}.bias': shape[:1] for name, shape in weights.items() if name != 'map_augment'},
        **{f'{name}.resample_filter': (1, 1, 2, 2) for name in resampling},
    }


def random_state(unet=CONDITIONAL):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.full(shape, 0.25)
            if name.endswith('filter')
            else torch.randn(shape, generator=generator)
        )
        for name, shape in network_shapes(unet).items()
    }


class Persistent:
    """What NVIDIA's decorator makes of a module: pickled as its class's source and its state."""

    def __init__(self, class_name, **state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = sys.modules['dnnlib.util'].EasyDict(
            type='class',
            version=6,
            module_src=MODULE_SRC,
            class_name=self.class_name,
            state=self.state,
        )
        return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (meta,)


def tree(state, class_name='Layer', **attributes):
    """Nest a flat state dict into modules; the containers ``enc`` and ``dec`` are torch's own."""
    own = {name: value for name, value in state.items() if '.' not in name}
    buffers = {name: own.pop(name) for name in ('resample_filter', 'freqs') if name in own}
    children = dict.fromkeys(name.split('.')[0] for name in state if '.' in name)
    contents = dict(
        _parameters=OrderedDict(
            {name: nn.Parameter(value) for name, value in own.items()}, absent=None
        ),
        _buffers=OrderedDict(buffers, absent=None),
        _non_persistent_buffers_set=set(),
        _modules=OrderedDict(
            {
                child: tree(
                    {
                        name[len(child) + 1 :]: value
                        for name, value in state.items()
                        if name.startswith(f'{child}.')
                    },
                    child,
                )
                for child in children
            },
            absent=None,
        ),
    )
    if class_name in ('enc', 'dec'):
        container = nn.ModuleDict()
        container.__dict__.update(contents)
        return container
    return Persistent(class_name, **contents, **attributes)


def dump(content):
    """Pickle with modules of EDM's names in place, which are gone before anything is read."""
    modules = {
        path: types.ModuleType(path)
        for path in ('torch_utils', 'torch_utils.persistence', 'dnnlib', 'dnnlib.util')
    }
    modules['dnnlib.util'].EasyDict = type('EasyDict', (dict,), dict(__module__='dnnlib.util'))
    rebuild = modules['torch_utils.persistence']._reconstruct_persistent_obj = lambda meta: meta
    rebuild.__module__, rebuild.__qualname__ = (
        'torch_utils.persistence',
        '_reconstruct_persistent_obj',
    )
    with pytest.MonkeyPatch.context() as patch:
        for path, module in modules.items():
            patch.setitem(sys.modules, path, module)
        return pickle.dumps(content)


@pytest.fixture
def edm_file(tmp_path, monkeypatch):
    """Write an EDM pickle into the empty current directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(
        state=None,
        unet=CONDITIONAL,
        outer='EDMPrecond',
        inner='SongUNet',
        sigma_data=0.5,
        change=id,
    ):
        state = {f'model.{name}': value for name, value in (state or random_state(unet)).items()}
        network = tree(
            state,
            outer,
            sigma_data=sigma_data,
            _init_kwargs=dict(model_type=inner, dropout=unet['dropout']),
        )
        network.state['_modules']['model'].class_name = inner
        content = dict(
            ema=network,
            loss_fn=Persistent('EDMLoss'),
            augment_pipe=Persistent('AugmentPipe', p=0.12),
            dataset_kwargs=dict(path='cifar10.zip'),
        )
        change(content)
        (tmp_path / 'network.pkl').write_bytes(dump(content))
        return 'network.pkl'

    return write


@pytest.mark.parametrize('unet', [CONDITIONAL, UNCONDITIONAL])
def test_round_trip(edm_file, unet):
    state = random_state(unet)
    found, config = read_edm_pickle(edm_file(state, unet, sigma_data=0.7))
    assert config == dict(unet=dict(type='EDMUNet', **unet), sigma_data=0.7)
    assert found.keys() == state.keys() and all(
        torch.equal(found[name], value) for name, value in state.items()
    )
    EDMUNet(**unet).load_state_dict(found, strict=True)
    assert not os.path.exists(MARKER) and 'dnnlib' not in sys.modules


def test_half_precision_strides_and_defaults(edm_file):
    state = {
        name: (
            value.half() if value.dim() < 2 else value.transpose(0, 1).contiguous().transpose(0, 1)
        )
        for name, value in random_state().items()
    }

    name = edm_file(
        state,
        change=lambda content: list(map(content['ema'].state.pop, ('sigma_data', '_init_kwargs'))),
    )
    found, config = read_edm_pickle(name)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], value.float()) for name, value in state.items())
    assert config['unet'] == dict(type='EDMUNet', **{**CONDITIONAL, 'dropout': 0.0})
    assert config['sigma_data'] == 0.5


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(outer='VPPrecond'), 'preconditioning .*VPPrecond, but only EDMPrecond'),
        (dict(inner='UNet'), 'model class UNet, but only SongUNet and DhariwalUNet'),
        # another class than its tensors are of
        (dict(inner='DhariwalUNet'), r'is damaged .*out_conv\.weight'),
        (dict(sigma_data=float('nan')), 'sigma_data=nan'),
        (
            dict(change=lambda content: content.pop('ema')),
            r"has no 'ema'; it holds \['loss_fn', 'augment_pipe', 'data",
        ),
        (dict(change=lambda content: content.update(ema=3)), 'a int'),
        (
            dict(
                change=lambda content: content['ema'].state['_modules'].update(loop=content['ema'])
            ),
            'within itself or twice',
        ),
    ],
)
def test_other_networks_are_refused(edm_file, kwargs, message):
    with pytest.raises(UsageError, match=f'network.pkl.*{message}'):
        read_edm_pickle(edm_file(**kwargs))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'map_noise.freqs': torch.ones(4)}, 'NCSN\\+\\+ .*map_noise.freqs.*vp'),
        ({'enc.4x4_aux_down.weight': torch.ones(1)}, 'NCSN\\+\\+ .*aux_down.*vp'),
        (
            {'enc.4x4_down.conv0.resample_filter': torch.ones(1, 1, 4, 4)},
            'NCSN\\+\\+ .*resample_filter.*vp',
        ),
        (
            {'enc.4x4_down.conv0.resample_filter': torch.ones(1, 1, 2, 2)},
            'resample_filter.* other than the 2x2 mean',
        ),
        (
            {'map_layer1.weight': torch.ones(2, 2)},
            r"'map_layer1.weight' has the shape \(2, 2\) there, but \(16, 16\)",
        ),
        (
            {'map_layer2.weight': torch.ones(2, 2)},
            r"'map_layer2.weight' has the shape \(2, 2\) there, but None",
        ),
        (
            {'map_layer1.weight': torch.ones(16, 16, dtype=torch.int64)},
            'int64, not of floating-point',
        ),
        (
            {'map_layer1.weight': torch.ones(1).expand(16, 16)},
            'does not fit in its storage of 1 numbers',
        ),
    ],
)
def test_other_architectures_are_refused(edm_file, monkeypatch, change, message):
    monkeypatch.setattr(nn, 'Parameter', lambda value: value)  # integers cannot be parameters
    with pytest.raises(UsageError, match=message):
        read_edm_pickle(edm_file({**random_state(), **change}))


class Attack:
    def __init__(self, function, *args):
        self.reduction = function, args

    def __reduce__(self):
        return self.reduction


def tensor_of(storage, offset=0):
    return Attack(
        torch._utils._rebuild_tensor_v2, storage, offset, (1,), (1,), False, OrderedDict()
    )


TOUCH = Attack(os.system, f'touch {MARKER}')
# torch's format of a storage, with an attack in the place of the storage
NESTED = b''.join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, TOUCH))


@pytest.mark.parametrize(
    'attack, message',
    [
        (TOUCH, r'holds \w+.system,'),
        (Attack(eval, f'open({MARKER!r}, "w")'), 'holds builtins.eval,'),
        (Attack(getattr, '', 'join'), 'holds builtins.getattr,'),
        (Attack(torch.load, MARKER), 'holds torch.serialization.load,'),
        (types.SimpleNamespace(), 'holds types.SimpleNamespace,'),
        (
            tensor_of(Attack(torch.storage._load_from_bytes, NESTED)),
            r'with more than numbers \(\w+.system\)',
        ),
        (
            tensor_of(Attack(torch.storage._load_from_bytes, b'PK\x03\x04')),
            'format that torch does not use',
        ),
        (
            tensor_of(torch.ones(1)._typed_storage(), offset=1),
            'does not fit in its storage of 1 numbers',
        ),
    ],
)
def test_code_is_refused_by_name(edm_file, attack, message):
    name = edm_file(change=lambda content: content['ema'].state['_buffers'].update(planted=attack))
    with pytest.raises(UsageError, match=message):
        read_edm_pickle(name)
    assert not os.path.exists(MARKER)


def raw(*ops):
    return b'\x80\x04' + b''.join(ops) + b'.'


def text(value):
    return b'\x8c' + bytes([len(value)]) + value.encode()


TENSOR_CLASS = text('torch._utils') + text('_rebuild_tensor_v2') + b'\x93'
DICT_CLASS = text('dnnlib.util') + text('EasyDict') + b'\x93'


@pytest.mark.parametrize(
    'content',
    [
        raw(text('torch._utils'), text('_rebuild_tensor_v2.__globals__'), b'\x93'),  # a dotted name
        raw(
            TENSOR_CLASS, b'N}', text('__init__'), DICT_CLASS, b's\x86b'
        ),  # setattr on a stand-in's class
        raw(DICT_CLASS, b'N}', text('__getitem__'), DICT_CLASS, b's\x86b'),
        raw(TENSOR_CLASS, b')R}', text('__setstate__'), DICT_CLASS, b'sb}b'),  # and on an instance
        raw(b'Nr\xff\xff\xff\xff'),
        raw(b'\x8e', struct.pack('<Q', 1 << 60)),  # 64 GiB of memo, bytes not there
        raw(text('1'), b'Q'),
        raw(b'\x82\x01'),
        raw(b']' + b'\x85' * 50000),
        raw(b'}' * 2, b'Ns'),
        b'',
        b'.',
        b'\x80\x04.',
        b'not a pickle',
        raw(b'\x8c\x01\xff'),
        pickle.dumps([1]),
        pickle.dumps({}),
    ],
)
def test_hostile_opcodes(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'network.pkl').write_bytes(content)
    before = {cls: dict(vars(cls)) for cls in GLOBALS.values()}
    message = (
        'LONG_BINPUT' if b'r\xff' in content else 'EXT1' if b'\x82' in content else 'network.pkl'
    )
    with pytest.raises(UsageError, match=message):
        read_edm_pickle('network.pkl')
    assert before == {cls: dict(vars(cls)) for cls in GLOBALS.values()}


def test_truncated_and_flipped_bytes(edm_file):
    name = edm_file()
    good, rng = Path(name).read_bytes(), random.Random(0)
    damaged = [good[: len(good) * i // 20] for i in range(20)] + [good[:-1]]
    for i in range(200):
        damaged.append(bytearray(good))
        damaged[-1][rng.randrange(len(good) if i % 2 else 2000)] ^= 1 << rng.randrange(8)
    refused = set()
    for i, content in enumerate(damaged):
        Path(name).write_bytes(content)
        try:
            read_edm_pickle(name)
        except UsageError:
            refused.add(i)
    assert refused.issuperset(range(21)) and 21 < len(refused) < len(damaged)
    assert os.listdir() == [name]


def test_the_tool(edm_file, capsys):
    state = random_state()
    name = edm_file(state)
    main([name, 'out.safetensors'])
    printed = capsys.readouterr().out
    sha256, config = (
        hashlib.sha256(Path(name).read_bytes()).hexdigest(),
        json.loads(Path('out.json').read_text()),
    )
    unet = dict(type='EDMUNet', **CONDITIONAL)
    assert config == dict(unet=unet, sigma_data=0.5, source=name, sha256=sha256)
    with safe_open('out.safetensors', 'pt') as f:
        assert f.metadata().items() > dict(format='pt', source=name, sha256=sha256).items()
    assert all(
        torch.equal(value, state[key]) for key, value in load_file('out.safetensors').items()
    )
    network = load_network(EDMUNet(**CONDITIONAL), 'out.safetensors')
    assert f'{sum(p.numel() for p in network.parameters()):,} parameters' in printed

    pasted = eval(f'dict({", ".join(printed.splitlines()[-2:])})')
    assert pasted['network'] == dict(
        type='EDMVelocity', sigma_data=0.5, unet=dict(type='EDMUNet', **CONDITIONAL)
    )
    assert pasted['teacher'] == dict(checkpoint='out.safetensors', into='unet')
    assert sorted(os.listdir()) == ['network.pkl', 'out.json', 'out.safetensors']

    main([name, 'out.safetensors', '--force'])
    os.mkdir('folder.safetensors')
    for args, message in [
        ([name, 'out.safetensors'], "['out.safetensors', 'out.json'] would be overwritten"),
        ([name, 'w.pth'], "name it 'w.safetensors'"),
        (['nowhere.pkl', 'w.safetensors'], 'No such file'),
        ([name, 'nowhere/w.safetensors'], 'cannot be written'),
        ([name, 'folder.safetensors', '--force'], 'cannot be written'),
        ([name, 'w.safetensors', '--key', 'net'], "has no 'net'"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert sorted(os.listdir()) == [
        'folder.safetensors',
        'network.pkl',
        'out.json',
        'out.safetensors',
    ]


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_non_finite_weights_are_refused(edm_file, bad):
    state = random_state()
    name = next(iter(state))
    state[name].view(-1)[-1] = bad
    with pytest.raises(NonFiniteInputError, match=f'inf or nan in 1 of .*{re.escape(name)}'):
        read_edm_pickle(edm_file(state))
