# Copyright (c) mmfgm authors.
"""SiT's transformer, held against a functional reference of the published networks."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance, NullLabel
from mmfgm.models import FGM, SiT, load_network

TINY = dict(latent_size=8, width=16, depth=3, num_heads=2, num_classes=5)


def tiny(**settings):
    """A network with every weight at random, the fixed embedding of positions aside."""
    torch.manual_seed(0)
    network = SiT(**{**TINY, **settings})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network.double().eval()


def inputs(n=4):
    g = torch.Generator().manual_seed(1)
    x_t = torch.randn(n, 4, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.97, 1.0], dtype=torch.float64)[:n]
    return x_t, t, torch.tensor([0, 4, 5, 2])[:n]


def published(state, x, t, y, heads, size, patch=2, channels=4):
    """The published network of a state dict: time from noise (0) to data (1), output data - noise;
    also the tokens after each block. One image and one token at a time, so that no layout of
    tensors is shared with what it is compared to."""
    width = state['pos_embed'].shape[2]
    side = size // patch
    depth = 1 + max(int(name.split('.')[1]) for name in state if name.startswith('blocks.'))

    def linear(name, h):
        return h @ state[f'{name}.weight'].T + state[f'{name}.bias']

    def norm(h):
        variance = h.var(-1, unbiased=False, keepdim=True)
        return (h - h.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()

    def attention(name, h):
        head = width // heads
        out = torch.empty_like(h)
        q, k, v = linear(f'{name}.qkv', h).split(width, dim=1)
        for i in range(heads):
            part = slice(i * head, (i + 1) * head)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(head)).softmax(1)
            out[:, part] = weights @ v[:, part]
        return linear(f'{name}.proj', out)

    def gelu(h):
        return 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())

    images, tokens = [], []
    for image, time, label in zip(x, t, y):
        h = torch.stack(
            [
                image[:, r : r + patch, c : c + patch].flatten()
                @ state['x_embedder.proj.weight'].flatten(1).T
                + state['x_embedder.proj.bias']
                for r in range(0, size, patch)
                for c in range(0, size, patch)
            ]
        )
        h = h + state['pos_embed'][0]
        angles = [time * 10000 ** (-i / 128) for i in range(128)]
        features = torch.stack([a.cos() for a in angles] + [a.sin() for a in angles])
        emb = linear('t_embedder.mlp.2', F.silu(linear('t_embedder.mlp.0', features)))
        emb = F.silu(emb + state['y_embedder.embedding_table.weight'][label])
        after = []
        for i in range(depth):
            modulation = linear(f'blocks.{i}.adaLN_modulation.1', emb)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.split(width)
            h = h + gate_1 * attention(f'blocks.{i}.attn', norm(h) * (1 + scale_1) + shift_1)
            hidden = linear(f'blocks.{i}.mlp.fc1', norm(h) * (1 + scale_2) + shift_2)
            h = h + gate_2 * linear(f'blocks.{i}.mlp.fc2', gelu(hidden))
            after.append(h)
        shift, scale = linear('final_layer.adaLN_modulation.1', emb).split(width)
        h = linear('final_layer.linear', norm(h) * (1 + scale) + shift)
        out = x.new_empty(h.shape[1] // patch**2, size, size)
        for token, values in enumerate(h):
            r, c = divmod(token, side)
            for number, value in enumerate(values):
                place, channel = divmod(number, len(out))
                down, right = divmod(place, patch)
                out[channel, r * patch + down, c * patch + right] = value
        images.append(out[:channels])
        tokens.append(torch.stack(after))
    return torch.stack(images), torch.stack(tokens)


def xl_2_shapes():
    """Names and shapes of the tensors in the published SiT-XL/2 files of 256-pixel images."""
    width = 1152
    shapes = {
        'pos_embed': (1, 256, width),
        'x_embedder.proj.weight': (width, 4, 2, 2),
        'x_embedder.proj.bias': (width,),
        'y_embedder.embedding_table.weight': (1001, width),
    }
    layers = {
        't_embedder.mlp.0': (width, 256),
        't_embedder.mlp.2': (width, width),
        'final_layer.linear': (2 * 2 * 8, width),
        'final_layer.adaLN_modulation.1': (2 * width, width),
    }
    for i in range(28):
        layers[f'blocks.{i}.attn.qkv'] = (3 * width, width)
        layers[f'blocks.{i}.attn.proj'] = (width, width)
        layers[f'blocks.{i}.mlp.fc1'] = (4 * width, width)
        layers[f'blocks.{i}.mlp.fc2'] = (width, 4 * width)
        layers[f'blocks.{i}.adaLN_modulation.1'] = (6 * width, width)
    for name, shape in layers.items():
        shapes[f'{name}.weight'] = shape
        shapes[f'{name}.bias'] = shape[:1]
    return shapes


def test_state_dict_of_xl_2():
    with torch.device('meta'):
        network = SiT()
    state = network.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == xl_2_shapes()
    # the 675 M of the paper
    assert sum(value.numel() for value in state.values()) == 675_129_632
    assert network.event_shape == (4, 32, 32) and network.num_classes == 1000


@pytest.mark.parametrize('learn_sigma', [True, False])
def test_velocity_is_minus_the_published_network_at_1_minus_t(learn_sigma):
    network = tiny(learn_sigma=learn_sigma)
    x_t, t, labels = inputs()
    expected, tokens = published(network.state_dict(), x_t, 1 - t, labels, heads=2, size=8)
    with torch.no_grad():
        torch.testing.assert_close(network(x_t, t, labels), -expected, rtol=1e-10, atol=1e-10)
        # features are after a layer, as maps
        features = network(x_t, t, labels, feature_layer=(3, 1))
        for found, layer in zip(features, (3, 1)):
            rows = tokens[:, layer - 1].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
            torch.testing.assert_close(found, rows, rtol=1e-10, atol=1e-10)
        assert torch.equal(network(x_t, t, labels, feature_layer=3), features[0])


def test_positions_are_sines_and_cosines():
    """Of the column in the first half of the channels, and of the row in the second."""
    width = TINY['width']
    quarter = width // 4
    for place, (row, column) in {0: (0, 0), 2: (0, 2), 7: (1, 3)}.items():
        expected = [
            f(position * 10000 ** (-i / quarter))
            for position in (column, row)
            for f in (math.sin, math.cos)
            for i in range(quarter)
        ]
        found = SiT(**TINY).pos_embed[0, place]
        torch.testing.assert_close(found, torch.tensor(expected))


def test_guidance_of_three_channels_as_published():
    """Ma et al. sample with guidance on the first three of four channels."""
    network = tiny()
    x_t, t, labels = inputs()
    guidance = ClassifierFreeGuidance(1.5, NullLabel(5), channels=3)
    state = network.state_dict()
    with torch.no_grad():
        found = guidance(network, x_t, t, dict(labels=labels))
        cond, _ = published(state, x_t, 1 - t, labels, heads=2, size=8)
        null, _ = published(state, x_t, 1 - t, torch.full_like(labels, 5), heads=2, size=8)
    guided = null + 1.5 * (cond - null)
    expected = -torch.cat([guided[:, :3], cond[:, 3:]], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_recomputation_changes_nothing_but_memory():
    x_t, t, labels = inputs()
    gradients = []
    for checkpointing in (False, True):
        network = tiny(checkpointing=checkpointing)
        calls: list[int] = []
        for i, block in enumerate(network.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        x = x_t.clone().requires_grad_()
        network(x, t, labels).square().sum().backward()
        # each block again in the backward pass
        assert len(calls) == (2 if checkpointing else 1) * TINY['depth']
        gradients.append([x.grad, *(p.grad for p in network.parameters())])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize('kind', ['plain', 'ema'])
def test_published_file_is_the_teacher(kind, tmp_path):
    source = tiny().float()
    state = source.state_dict()
    others = {name: torch.zeros_like(value) for name, value in state.items()}
    content = state if kind == 'plain' else dict(model=others, ema=state, opt=dict(step=1))
    torch.save(content, tmp_path / 'SiT.pt')
    model = FGM(
        network=dict(type='SiT', **TINY),
        teacher=dict(checkpoint=str(tmp_path / 'SiT.pt'), prefix=''),
        fm_time_sampler=dict(type='Uniform'),
        fgm_time_sampler=dict(type='Uniform'),
    )
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_file_with_arguments_needs_trust(tmp_path):
    """SiT's training keeps its command line beside the weights, and that is a pickled object."""
    source = tiny().float()
    path = str(tmp_path / 'train.pt')
    torch.save(dict(ema=source.state_dict(), args=argparse.Namespace(model='SiT-XL/2')), path)
    with pytest.raises(UsageError, match=r'argparse\.Namespace.*weights_only=False'):
        load_network(SiT(**TINY), path)
    loaded = load_network(SiT(**TINY), path, weights_only=False)
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_training_leaves_positions_alone():
    """They are in the state dict, but no optimizer, frozen or not, may see them."""
    network = tiny().requires_grad_(True)
    assert 'pos_embed' not in dict(network.named_parameters())
    assert not network.pos_embed.requires_grad


def test_bad_settings():
    with pytest.raises(UsageError, match='multiple of patch_size=2, found 9'):
        SiT(**{**TINY, 'latent_size': 9})
    with pytest.raises(UsageError, match='num_heads=3'):
        SiT(**{**TINY, 'num_heads': 3})
    with pytest.raises(UsageError, match='layers 1 to 3'):
        tiny()(*inputs(), feature_layer=4)
    x_t, t, _ = inputs()
    with pytest.raises(ValueError, match='without labels'):
        tiny()(x_t, t)
