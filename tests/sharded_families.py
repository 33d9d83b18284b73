# Copyright (c) mmfgm authors.
"""The gradients of one FGM cycle of a tiny model of each family, on one process or sharded."""

import sys

import torch
import torch.distributed as dist
from mmengine.registry import DefaultScope

from mmfgm.engine import FSDP2Strategy
from mmfgm.flow import ClassifierFreeGuidance
from mmfgm.models.families import find
from mmfgm.processes import init_processes
from tests.helpers import RowNoiseFGM

PROMPTS = ['a red cat', 'the blue house on a green tree', 'a dog', 'two birds']


def build(folder):
    """A model whose networks differ from each other, with guidance, a GAN and recomputation."""
    family = find(folder)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmfgm'):
        model = RowNoiseFGM(
            dict(
                type=family.network.__name__, pretrained=folder, latent_size=4, checkpointing=True
            ),
            teacher=dict(checkpoint=None),
            fm_time_sampler=dict(type='LogitNormal', mean=-1.0, std=2.0),
            fgm_time_sampler=dict(type='LogitNormal', mean=2.4, std=1.0),
            generator=dict(t_star=0.97, c_in=0.8),
            loss=dict(type='FGMLoss', l1_weight=0.0),
            gan=dict(
                feature_layer=2,
                time_sampler=dict(type='LogitNormal', mean=-1.0, std=1.0),
                head=dict(type='ConvDiscriminator', channels=8),
            ),
            ema=dict(),
        )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    null = family.null(family.encoder(folder))
    model.guidance = ClassifierFreeGuidance(
        4.0, lambda cond: {name: null[name].expand_as(value) for name, value in cond.items()}
    )
    return model


def gradients(folder, strategy):
    """The mean gradients over processes of both phases, by network and parameter, and the bytes of
    parameters that this process holds."""
    model = build(folder)
    cond = find(folder).encode(folder, PROMPTS)
    real = torch.randn(len(PROMPTS), *model.event_shape, generator=torch.Generator().manual_seed(1))
    model = strategy._wrap_model(model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = torch.arange(rank, len(PROMPTS), world)
    cond = {name: value[mine] for name, value in cond.items()}
    batch = dict(idx=mine, cond=cond, real=dict(x_0=real[mine], cond=cond))
    found = {}
    for name, phase in model.phases.items():
        frozen = [model.networks[network] for network in phase.freezes]
        with strategy.frozen(frozen):
            samples = model.prepare(batch, phase.differentiable)
            losses = model(samples, mode=name)
            sum(value for key, value in losses.items() if 'loss' in key).backward()
        for network in phase.trains:
            for key, p in model.networks[network].named_parameters():
                # the last text block of some models ends nowhere
                if p.grad is not None:
                    whole = p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad
                    found[f'{name}/{network}', key] = whole
        model.zero_grad(set_to_none=True)
    parts = (p.to_local() if hasattr(p, 'to_local') else p for p in model.parameters())
    return found, sum(part.numel() * part.element_size() for part in parts)


def main(out, *folders):
    init_processes('pytorch')
    kept = {}
    for folder in folders:
        strategy = FSDP2Strategy(block_types=find(folder).block_types, work_dir=out)
        kept[folder] = gradients(folder, strategy)
    if dist.get_rank() == 0:
        torch.save(kept, f'{out}/gradients.pth')
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
