# Copyright (c) mmfgm authors.
"""What the engine costs: our loop with all hooks against a hand-written loop that does the same maths.

Both run in one process on equal networks, in alternating blocks, so that other load on the machine meets
both alike. Prints the median time of an iteration of each, and their ratio.

    python tools/benchmark/train_step.py [CONFIG] [--iters 200] [--block 10]
"""
import argparse
import copy
import statistics
import tempfile
import time

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from mmfgm.engine import FlowRunner
from mmfgm.models import OneStepGenerator
from mmfgm.registry import TASK_UTILS


class BareLoop:
    """Algorithm 1, written by hand for one class-conditional config: no hooks, no log, no checks."""

    def __init__(self, cfg, teacher, device):
        self.n, self.num_classes = cfg.train_dataloader.batch_size, cfg.model.network.get('num_classes', 0)
        self.teacher, self.event_shape, self.device = teacher, teacher.event_shape, device
        self.online = copy.deepcopy(teacher).requires_grad_(True)
        self.generator = OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True), **cfg.model.generator)
        self.ema = copy.deepcopy(self.generator).requires_grad_(False)
        self.opt = {name: torch.optim.Adam(getattr(self, name).parameters(),
                                           **{k: v for k, v in cfg.optim_wrapper[name].optimizer.items() if k != 'type'})
                    for name in ('online', 'generator')}
        self.t_fm, self.t_fgm = (TASK_UTILS.build(cfg.model[key]) for key in ('fm_time_sampler', 'fgm_time_sampler'))
        self.l1_weight = cfg.model.loss.l1_weight
        self.shared = cfg.train_cfg.get('share_samples', False)

    def generate(self):
        cond = dict(labels=torch.randint(self.num_classes, (self.n,), device=self.device)) if self.num_classes else {}
        return self.generator(torch.randn(self.n, *self.event_shape, device=self.device), **cond), cond

    def diffuse(self, x_0, t):
        eps = torch.randn_like(x_0)
        s = t.view(-1, *(1,) * (x_0.ndim - 1))
        return (1 - s) * x_0 + s * eps, eps - x_0

    def step(self):
        with torch.set_grad_enabled(self.shared):
            x_0, cond = self.generate()
        t = self.t_fm(self.n, self.device)
        x_t, target = self.diffuse(x_0.detach(), t)
        (self.online(x_t, t, **cond) - target).square().flatten(1).sum(1).mean().backward()
        self.opt['online'].step()
        self.opt['online'].zero_grad()

        self.online.requires_grad_(False)
        if not self.shared:
            x_0, cond = self.generate()
        t = self.t_fgm(self.n, self.device)
        x_t, target = self.diffuse(x_0, t)
        u, v = self.teacher(x_t, t, **cond), self.online(x_t, t, **cond)
        loss = 2 * ((u - v) * (v - target)).flatten(1).sum(1).mean()
        if self.l1_weight:
            loss = loss + self.l1_weight * (u - v).square().flatten(1).sum(1).mean()
        loss.backward()
        self.opt['generator'].step()
        self.opt['generator'].zero_grad()
        self.online.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 0.01)


class Alternate(Hook):
    """After each block of our iterations, run and time a block of the bare loop's."""

    priority = 'LOWEST'

    def __init__(self, bare, block):
        self.bare, self.block = bare, block
        self.ours, self.theirs = [], []

    @staticmethod
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before_train(self, runner):
        self.start = self.now()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (batch_idx + 1) % self.block:
            return
        middle = self.now()
        self.ours.append((middle - self.start) / self.block)
        for _ in range(self.block):
            self.bare.step()
        self.start = self.now()
        self.theirs.append((self.start - middle) / self.block)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', nargs='?', default='configs/fgm/digits.py')
    parser.add_argument('--iters', type=int, default=200)
    parser.add_argument('--block', type=int, default=10)
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    with tempfile.TemporaryDirectory() as work_dir:
        # speed does not depend on the weights, so no teacher is needed; evaluations and pictures are extra maths
        cfg.merge_from_dict({'work_dir': work_dir, 'launcher': 'none', 'train_cfg.max_iters': args.iters + args.block,
                             'model.teacher.checkpoint': None, 'log_level': 'WARNING'})
        cfg.evaluations = {}
        cfg.default_hooks.checkpoint.pop('save_best', None)
        cfg.default_hooks.pop('samples')
        runner = FlowRunner.from_cfg(cfg)
        runner.prepare()
        teacher = runner.model.teacher
        hook = Alternate(BareLoop(cfg, teacher, next(teacher.parameters()).device), args.block)
        runner.register_hook(hook)
        runner.train()
    # the first block warms up
    ours, theirs = statistics.median(hook.ours[1:]), statistics.median(hook.theirs[1:])
    ratio = statistics.median(a / b for a, b in zip(hook.ours[1:], hook.theirs[1:]))
    print(f'{args.config}: {args.iters} iterations in blocks of {args.block}')
    print(f'bare loop            {1000 * theirs:8.2f} ms an iteration')
    print(f'our loop with hooks  {1000 * ours:8.2f} ms an iteration')
    print(f'ratio                {ratio:8.3f}')


if __name__ == '__main__':
    main()
