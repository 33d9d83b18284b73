# Copyright (c) mmfgm authors.
"""FGM of Stable Diffusion 3 in a plain torch loop, for a trainer of your own.

mmfgm gives the path, the densities of t, guidance, the generator and the losses; the networks,
optimizers, averages, devices and logging are yours. Where accelerate or Lightning is used, prepare
the networks and both optimizers there and replace ``backward()`` by theirs. Without
``--pretrained``, a tiny random transformer shows the loop.
"""

import argparse
import copy

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmfgm.flow import ClassifierFreeGuidance, LinearPath, LogitNormal
from mmfgm.models.generators import OneStepGenerator
from mmfgm.models.losses import FGMLoss, FlowMatchingLoss

TINY = dict(
    sample_size=8,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=16,
    pooled_projection_dim=16,
    pos_embed_max_size=8,
)


class Velocity(nn.Module):
    """diffusers' transformer as ``v(x_t, t, **cond)`` with t in [0, 1]."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, x_t, t, prompt, pooled):
        return self.transformer(x_t, prompt, pooled, 1000 * t).sample


def prompts(batch_size, config):
    """Stands for a batch of your encoded prompts."""
    return dict(
        prompt=torch.randn(batch_size, 12, config.joint_attention_dim),
        pooled=torch.randn(batch_size, config.pooled_projection_dim),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pretrained', help='hub id or local folder (default: tiny and random)')
    parser.add_argument('--iters', type=int, default=20)
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--lr', type=float, default=5e-6)
    parser.add_argument('--out', default='own_loop.pt', help='where the averaged generator goes')
    args = parser.parse_args()
    torch.manual_seed(0)

    if args.pretrained:
        load = SD3Transformer2DModel.from_pretrained
        transformer = load(args.pretrained, subfolder='transformer')
    else:
        transformer = SD3Transformer2DModel(**TINY)
    config = transformer.config
    shape = (args.batch_size, config.in_channels, config.sample_size, config.sample_size)

    teacher = Velocity(transformer).requires_grad_(False)
    online = copy.deepcopy(teacher).requires_grad_(True)
    generator = OneStepGenerator(copy.deepcopy(online), t_star=0.97, c_in=0.8)  # (B.2)
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    adam = dict(lr=args.lr, betas=(0.0, 0.999), eps=1e-6)
    online_optimizer = torch.optim.Adam(online.parameters(), **adam)
    generator_optimizer = torch.optim.Adam(generator.parameters(), **adam)

    empty = {name: value[:1] for name, value in prompts(1, config).items()}
    guided = ClassifierFreeGuidance(
        4.0, lambda cond: {name: empty[name].expand_as(value) for name, value in cond.items()}
    )
    online_loss, loss = FlowMatchingLoss(), FGMLoss(l1_weight=0.0)
    online_times, generator_times = LogitNormal(-1.0, 2.0), LogitNormal(2.4, 1.0)

    for step in range(1, args.iters + 1):
        # 1. the online network learns the flow of the generator's samples
        cond = prompts(args.batch_size, config)
        with torch.no_grad():
            x_0 = generator(torch.randn(shape), **cond)
        path = LinearPath.sample(x_0, online_times(args.batch_size))
        fm = online_loss(None, online(path.x_t, path.t, **cond), path)['loss_fm']
        online_optimizer.zero_grad()
        fm.backward()
        online_optimizer.step()

        # 2. the generator; its gradient passes through both velocities, whose weights stand still
        online.requires_grad_(False)
        cond = prompts(args.batch_size, config)
        x_0 = generator(torch.randn(shape), **cond)
        path = LinearPath.sample(x_0, generator_times(args.batch_size))
        u, v = guided(teacher, path.x_t, path.t, cond), online(path.x_t, path.t, **cond)
        fgm = 100 * loss(u, v, path)['loss_fgm']  # (B.2), the scale of the loss
        generator_optimizer.zero_grad()
        fgm.backward()
        generator_optimizer.step()
        online.requires_grad_(True)
        average.update_parameters(generator)
        print(f'{step}: loss_fm {fm.item():.4f}, loss_fgm {fgm.item():.4f}', flush=True)

    # samples are x_0 = generator(z, **cond) with these weights
    torch.save(average.module.network.transformer.state_dict(), args.out)


if __name__ == '__main__':
    main()
