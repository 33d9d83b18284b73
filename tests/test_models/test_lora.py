# Copyright (c) mmfgm authors.
"""Adapters over one shared base: the same maths as full weights W + s B A, in the memory of one
network."""

import copy
from contextlib import nullcontext

import pytest
import torch

from mmfgm.errors import UsageError
from mmfgm.models import FGM, SD3
from mmfgm.models.lora import LoRA, copy_network, has_adapters, merge_adapters

ATTENTION = ('attn.to_q', 'attn.to_k', 'attn.to_v', 'attn.to_out.0', 'ff.net.0.proj')
NETWORK = dict(
    type='SD3',
    latent_size=8,
    config=dict(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
    ),
)
SAMPLER = dict(type='Uniform')


def make_network():
    torch.manual_seed(0)
    return SD3(**{key: value for key, value in NETWORK.items() if key != 'type'}).double()


def inputs(n=3):
    g = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return dict(
        x_t=rand(n, 4, 8, 8),
        t=torch.rand(n, generator=g),
        prompt_embeds=rand(n, 5, 16),
        pooled_embeds=rand(n, 8),
    )


def perturb(network, seed=0):
    """Adapters away from their start, where B is 0."""
    g = torch.Generator().manual_seed(2 + seed)
    for p in network.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) / 4


def test_starts_as_its_base_and_shares_all_of_it():
    base = make_network()
    adapted = LoRA(rank=2, alpha=4, target_modules=ATTENTION).adapted(base)
    assert torch.equal(adapted(**inputs()), base(**inputs()))
    theirs = {id(p) for p in base.parameters()} | {id(b) for b in base.buffers()}
    own = [p for p in adapted.parameters() if id(p) not in theirs]
    assert own and all(p.requires_grad and p.dtype == torch.float32 for p in own)
    assert not any(p.requires_grad for p in base.parameters())
    assert all(id(b) in theirs for b in adapted.buffers())
    # a copy of it has adapters of its own over the same base
    average = copy_network(adapted)
    different = {id(p) for p in average.parameters()} - {id(p) for p in adapted.parameters()}
    assert len(different) == len(own) and not different & theirs


def test_gradient_is_that_of_the_full_weights():
    """``dL/dB = s dL/dW A^T`` and ``dL/dA = s B^T dL/dW`` for ``W = W_0 + s B A``."""
    base = make_network()
    lora = LoRA(rank=2, alpha=6, target_modules=ATTENTION)
    adapted = lora.adapted(base)
    perturb(adapted)
    merged = merge_adapters(adapted).requires_grad_(True)
    assert not has_adapters(merged) and merged.state_dict().keys() == base.state_dict().keys()
    outputs = [network(**inputs()) for network in (adapted, merged)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    assert (outputs[0] - base(**inputs())).abs().max() > 1e-2
    for output in outputs:
        output.pow(3).sum().backward()
    full, checked = dict(merged.named_parameters()), 0
    for name, module in adapted.named_modules():
        if hasattr(module, 'lora_A') and name.endswith(ATTENTION):
            a, b, g = (
                module.lora_A['default'].weight,
                module.lora_B['default'].weight,
                full[f'{name}.weight'].grad,
            )
            torch.testing.assert_close(b.grad, 3 * g @ a.T, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(a.grad, 3 * b.T @ g, rtol=1e-9, atol=1e-11)
            checked += 1
    assert checked == 2 * len(ATTENTION)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_networks_over_one_base_are_those_with_weights_of_their_own(checkpointing):
    """Outputs, and gradients where calls of several networks, the teacher's among them, meet in one
    backward pass: of each by its own adapters, and of what it is called on."""
    base = make_network()
    if checkpointing:
        base.transformer.enable_gradient_checkpointing()
    lora = LoRA(rank=2, alpha=6, target_modules=ATTENTION)
    roles = {name: lora.adapted(base) for name in ('online', 'generator')}
    for seed, role in enumerate(roles.values()):
        perturb(role, seed)
    copies = {name: copy.deepcopy(merge_adapters(role)) for name, role in roles.items()}
    for each in copies.values():
        each.requires_grad_(True)
    assert not torch.equal(*(role(**inputs()) for role in roles.values()))
    found = []
    for networks in (dict(roles, teacher=base), dict(copies, teacher=make_network())):
        batch = inputs()
        x = batch.pop('x_t').requires_grad_(True)
        x_0 = networks['generator'](x, **batch)
        u, v = (networks[name](x_0, **batch) for name in ('teacher', 'online'))
        ((u - v) * (v + x_0)).pow(2).sum().backward()
        found.append((u, v, x_0, x.grad))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for name, role in roles.items():
        full = dict(copies[name].named_parameters())
        for layer, adapter in role.adapters.items():
            a, b = (matrix['default'].weight for matrix in (adapter.lora_A, adapter.lora_B))
            g = full[f'{layer}.weight'].grad
            scale = g.abs().max().item()
            torch.testing.assert_close(b.grad, 3 * g @ a.T, rtol=1e-8, atol=1e-10 * scale)
            torch.testing.assert_close(a.grad, 3 * b.T @ g, rtol=1e-8, atol=1e-10 * scale)
    assert all(p.grad is None for p in base.parameters())


def test_recomputation_runs_under_the_adapters_of_its_call():
    """Gradients through one network alone stay out of the other, whichever was called last, and
    whichever calls while the backward pass runs."""
    base = make_network()
    base.transformer.enable_gradient_checkpointing()
    lora = LoRA(rank=2, alpha=6, target_modules=ATTENTION)
    roles = {name: lora.adapted(base) for name in ('online', 'generator')}
    for seed, role in enumerate(roles.values()):
        perturb(role, seed)
    for name, other in (('online', 'generator'), ('generator', 'online')):
        alone = []
        for called in ((name,), (name, other), (other, name)):
            outputs = {role: roles[role](**inputs()) for role in called}
            with roles[other].active() if len(called) > 1 else nullcontext():
                outputs[name].pow(2).sum().backward()
            assert all(p.grad is None for p in roles[other].parameters())
            alone.append([p.grad for p in roles[name].parameters()])
            roles[name].zero_grad()
        assert all(g.abs().max() > 0 for g in alone[0])
        for grads in alone[1:]:
            assert all(map(torch.equal, alone[0], grads))


def test_moves_reach_the_base():
    """A move to a GPU, for which a change of type stands here."""
    base = make_network()
    adapted = LoRA(rank=2, alpha=4, target_modules=ATTENTION).adapted(base)
    assert next(base.parameters()).dtype == torch.float64
    adapted.float()
    tensors = [*base.parameters(), *base.buffers(), *adapted.parameters()]
    assert all(value.dtype == torch.float32 for value in tensors)
    assert adapted.base is base and all('.lora_' in key for key in adapted.state_dict())


def test_merging_leaves_the_base_alone():
    base = make_network()
    before = copy.deepcopy(base.state_dict())
    adapted = LoRA(rank=2, alpha=4, target_modules=ATTENTION).adapted(base)
    perturb(adapted)
    expected = adapted(**inputs())
    merge_adapters(adapted)
    assert torch.equal(adapted(**inputs()), expected)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_fgm_trains_adapters_only():
    torch.manual_seed(0)
    model = FGM(
        network=NETWORK,
        teacher=dict(checkpoint=None),
        fm_time_sampler=SAMPLER,
        fgm_time_sampler=SAMPLER,
        lora=dict(rank=2, alpha=2, target_modules=ATTENTION),
    )
    base = sum(p.numel() for p in model.teacher.parameters())
    everything = {id(p): p.numel() for p in model.parameters()}
    adapters = sum(p.numel() for p in model.online.parameters() if p.requires_grad)
    assert sum(everything.values()) == base + 3 * adapters and adapters < base / 4
    trainable = {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {'online', 'generator'}


@pytest.mark.parametrize(
    'settings, message',
    [
        (
            dict(rank=0, alpha=1, target_modules=ATTENTION),
            'rank must be a whole number of at least 1, but is 0',
        ),
        (dict(rank=2, alpha=1, target_modules='attn.to_q'), 'must list endings'),
        (
            dict(rank=2, alpha=1, target_modules=('attn.query',)),
            "no layer of SD3 is called 'attn.query'",
        ),
        (dict(rank=2, alpha=1, target_modules=('attn',)), 'cannot be adapted'),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(UsageError, match=message):
        LoRA(**settings).adapted(make_network())
