# Copyright (c) mmfgm authors.
"""What 8 bits do to a teacher: how far its velocity is from that of float32, beside bf16.

Relative root mean squares over the training's real samples, noised to several times; and the same
of the gradient that comes back through the teacher from a random one. A GPU without fp8, and a CPU,
emulate it, which gives the same numbers.

    python tools/benchmark/fp8.py configs/fgm/shapes_small.py
"""

import argparse

import torch
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmfgm.apis import read_config
from mmfgm.datasets import collate
from mmfgm.flow import LinearPath
from mmfgm.models import FGM
from mmfgm.registry import DATASETS


def passed(
    network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], g: Tensor, bf16: bool
) -> tuple[Tensor, Tensor]:
    """``u``, and what of ``g`` comes back through it."""
    x_t = x_t.clone().requires_grad_(True)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
        u = network(x_t, t, **cond)
    u.float().backward(g)
    return u.detach().float(), x_t.grad


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--samples', type=int, default=64)
    parser.add_argument('--times', type=float, nargs='+', default=[0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
    args = parser.parse_args()
    cfg = read_config(args.config)
    init_default_scope('mmfgm')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    # guidance is beside the point, and the discriminator too
    model = {**cfg.model, 'guidance': None, 'online_guidance': None, 'gan': None}
    exact = FGM.build(model, networks=('teacher',)).teacher.to(device)
    teacher = {**cfg.model.teacher, 'fp8': True}
    rounded = FGM.build({**model, 'teacher': teacher}, networks=('teacher',)).teacher.to(device)
    data = DATASETS.build(cfg.train_dataloader.dataset)
    items = data.__getitems__(range(args.samples))
    batch = items if isinstance(items, dict) else collate(items)
    real = batch.get('real', batch)
    x_0 = real['x_0'].to(device).float()
    cond = {name: value.to(device) for name, value in real['cond'].items()}
    print('| t | bf16: u | its gradient | fp8: u | its gradient |\n| --- | --- | --- | --- | --- |')
    for time in args.times:
        torch.manual_seed(0)
        t = x_0.new_full((len(x_0),), time)
        x_t = LinearPath.interpolate(x_0, torch.randn_like(x_0), t)
        g = torch.randn_like(x_0)

        expected = passed(exact, x_t, t, cond, g, bf16=False)
        cells = []
        for network in (exact, rounded):
            found = passed(network, x_t, t, cond, g, bf16=True)
            cells += [f'{(a - b).norm() / b.norm():.4f}' for a, b in zip(found, expected)]
        print(f'| {time:g} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
