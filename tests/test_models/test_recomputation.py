# Copyright (c) mmfgm authors.
"""Recomputing all blocks, half of them, or all but attention changes what is kept, and nothing
else."""

import pytest
import torch

from mmfgm.errors import UsageError
from mmfgm.models import SD3
from mmfgm.models.families import find
from mmfgm.models.lora import LoRA
from mmfgm.models.networks import SiT
from tests.family_checks import PROMPTS, TINY
from tests.test_models.test_lora import ATTENTION, perturb
from tests.test_models.test_lora import NETWORK as SD3_NETWORK
from tests.test_models.test_lora import inputs as sd3_inputs

HOW = (False, 'attention', 0.5, True)


def measure(network, cond, x_t, t):
    """Velocity, gradients, and the bytes that autograd keeps for them."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        v = network(x_t, t, **cond)
    v.square().sum().backward()
    trained = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return v, trained, sum(kept)


def sit(checkpointing):
    torch.manual_seed(0)
    network = SiT(
        8,
        in_channels=2,
        width=32,
        depth=4,
        num_heads=2,
        num_classes=10,
        checkpointing=checkpointing,
    )
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def test_losses_are_equal_bit_for_bit_and_memory_lies_between():
    torch.manual_seed(1)
    x_t, t, cond = torch.randn(4, 2, 8, 8), torch.rand(4), dict(labels=torch.arange(4))
    found = {how: measure(sit(how), cond, x_t, t) for how in HOW}
    v, gradients, _ = found[False]
    for other, theirs, _ in found.values():
        assert torch.equal(other, v) and theirs.keys() == gradients.keys()
        assert all(torch.equal(theirs[name], grad) for name, grad in gradients.items())
    kept = {how: size for how, (_, _, size) in found.items()}
    assert kept[False] > kept[0.5] > kept[True], kept
    # half of what recomputation saves, as half of the blocks are
    assert kept[0.5] - kept[True] == pytest.approx((kept[False] - kept[True]) / 2, rel=0.1)


@pytest.mark.parametrize('how', HOW[1:])
def test_what_is_computed_again(how):
    """Each block's forward once more where it is recomputed, attention only where it is not
    kept."""
    calls = dict(blocks=[0] * 4, attention=0)
    network = sit(how)
    for i, block in enumerate(network.blocks):
        block.register_forward_pre_hook(
            lambda *args, i=i: calls['blocks'].__setitem__(i, calls['blocks'][i] + 1)
        )

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            calls['attention'] += '_scaled_dot_product' in name and 'backward' not in name
            return func(*args, **(kwargs or {}))

    v = network(torch.randn(2, 2, 8, 8), torch.rand(2), labels=torch.arange(2))
    with Count():
        v.sum().backward()
    expected = [1, 2, 1, 2] if how == 0.5 else [2] * 4
    assert calls['blocks'] == expected
    assert calls['attention'] == {'attention': 0, 0.5: 2, True: 4}[how]


@pytest.mark.parametrize('name', list(TINY))
def test_every_family_recomputes_what_it_is_told(name, tmp_path):
    folder = TINY[name](tmp_path)
    family = find(folder)
    cond = family.encode(folder, PROMPTS)
    results = []
    for how in HOW:
        network = family.load(folder, latent_size=4, checkpointing=how).train()
        torch.manual_seed(1)
        x_t, t = torch.randn(2, *network.event_shape), torch.rand(2)
        results.append(measure(network, cond, x_t, t))
    v, gradients, _ = results[0]
    for other, theirs, _ in results[1:]:
        assert torch.equal(other, v)
        for key, grad in gradients.items():
            torch.testing.assert_close(theirs[key], grad, rtol=1e-5, atol=1e-7)
    sizes = [size for _, _, size in results]
    assert sizes[0] > sizes[2] > sizes[3], sizes


@pytest.mark.parametrize('how', HOW[1:])
def test_adapters_are_those_of_the_forward_pass(how):
    """Under every way of recomputing, with another set of adapters called in between."""
    found = []
    for checkpointing in (False, how):
        torch.manual_seed(0)
        options = {key: value for key, value in SD3_NETWORK.items() if key != 'type'}
        base = SD3(**options, checkpointing=checkpointing).double()
        lora = LoRA(rank=2, alpha=2, target_modules=ATTENTION)
        first, second = lora.adapted(base), lora.adapted(base)
        for k, network in enumerate((first, second)):
            perturb(network.double(), k)
        loss = first(**sd3_inputs()).square().sum() + second(**sd3_inputs()).square().sum()
        loss.backward()
        found.append([p.grad for network in (first, second) for p in network.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('how', [1.5, -0.5, 'half'])
def test_bad_input(how):
    with pytest.raises(UsageError, match=r"a share in \[0, 1\] or 'attention', found"):
        sit(how)
    with pytest.raises(UsageError, match='checkpointing to be True'):
        options = {key: value for key, value in SD3_NETWORK.items() if key != 'type'}
        SD3(**options, checkpointing=how)
