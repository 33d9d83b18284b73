# Copyright (c) mmfgm authors.
r"""What an iteration of ours costs beside a hand-written loop that does the same maths.

``--baseline bare`` is the loop of somebody who knows all our savings, without hooks, log and
checks: the ratio is what the engine costs. ``--baseline no_grad`` writes Algorithm 1 down without
them: the generator runs in every phase, frozen networks collect gradients in the generator phase,
optimizers and averages go tensor by tensor. ``--baseline plain`` leaves the gradients of frozen
networks on in the online phase too, where the frozen one is the generator. ``--baseline realuid``
is that with RealUID's K online updates (``train_cfg.online_updates``), all on fresh samples.

Both loops run in one process on equal networks, in alternating blocks, so that other load on the
machine meets both alike. Before timing, their losses must agree. Prints the median time of an
iteration of each, the ratio, what our phases take, with ``--memory`` the peak memory of each in a
process of its own, and with ``--breakdown`` what the forward passes of each of our networks take in
an iteration; the rest of a phase is backward passes and optimizers. On a GPU that waits after each
pass, so that the ratio is then not one to quote.

    python tools/benchmark/train_step.py [CONFIG] [--iters 200] [--block 10]
    python tools/benchmark/train_step.py configs/fgm/cifar10_uncond.py --baseline realuid \
        --batch-size 4 --iters 8 --block 1 --cfg-options train_cfg.share_velocity=True
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import torch
from mmengine.config import DictAction
from mmengine.hooks import Hook

from mmfgm.apis import read_config
from mmfgm.datasets import collate
from mmfgm.engine import FlowRunner
from mmfgm.registry import MODELS, TASK_UTILS


class BareLoop:
    """Algorithm 1, written by hand for one config: no hooks, no log, no checks."""

    def __init__(self, cfg, teacher, batches, device):
        self.teacher, self.batches, self.device = teacher, batches, device
        self.event_shape = teacher.event_shape
        self.online = copy.deepcopy(teacher).requires_grad_(True)
        trainable = copy.deepcopy(teacher).requires_grad_(True)
        self.generator = MODELS.build({**cfg.model.generator, 'network': trainable})
        self.averages = [
            (copy.deepcopy(self.generator).requires_grad_(False), decay)
            for decay in cfg.model.get('ema', dict(generator_ema=0.999)).values()
        ]
        self.opt = {
            name: self.optimizer(getattr(self, name), cfg.optim_wrapper[name].optimizer)
            for name in ('online', 'generator')
        }
        self.t_fm, self.t_fgm = (
            TASK_UTILS.build(cfg.model[key]) for key in ('fm_time_sampler', 'fgm_time_sampler')
        )
        self.l1_weight = cfg.model.loss.l1_weight
        self.shared = cfg.train_cfg.get('share_samples', False)

    def optimizer(self, network, cfg):
        return torch.optim.Adam(
            network.parameters(), **{k: v for k, v in cfg.items() if k != 'type'}
        )

    def draw(self):
        batch = next(self.batches)
        cond = {k: v.to(self.device) for k, v in batch['cond'].items()}
        return torch.randn(len(batch['idx']), *self.event_shape, device=self.device), cond

    def diffuse(self, x_0, t):
        eps = torch.randn_like(x_0)
        s = t.view(-1, *(1,) * (x_0.ndim - 1))
        return (1 - s) * x_0 + s * eps, eps - x_0

    def fm_loss(self, x_0, cond):
        t = self.t_fm(len(x_0), self.device)
        x_t, target = self.diffuse(x_0, t)
        return (self.online(x_t, t, **cond) - target).square().mean()

    def fgm_loss(self, x_0, cond):
        t = self.t_fgm(len(x_0), self.device)
        x_t, target = self.diffuse(x_0, t)
        u, v = self.teacher(x_t, t, **cond), self.online(x_t, t, **cond)
        loss = 2 * ((u - v) * (v - target)).mean()
        if self.l1_weight:
            loss = loss + self.l1_weight * (u - v).square().mean()
        return loss

    def update(self, name, loss):
        loss.backward()
        self.opt[name].step()
        self.opt[name].zero_grad()
        return loss.detach()

    def step(self):
        z, cond = self.draw()
        if self.shared:
            x_0 = self.generator(z, **cond)
            losses = [self.generator_update(x_0, cond), self.online_update(x_0, cond)]
        else:
            with torch.no_grad():
                x_0 = self.generator(z, **cond)
            losses = [self.online_update(x_0, cond)]
            z, cond = self.draw()
            losses.append(self.generator_update(self.generator(z, **cond), cond))
        self.average()
        return losses

    def online_update(self, x_0, cond):
        return self.update('online', self.fm_loss(x_0.detach(), cond))

    def generator_update(self, x_0, cond):
        self.online.requires_grad_(False)
        loss = self.update('generator', self.fgm_loss(x_0, cond))
        self.online.requires_grad_(True)
        return loss

    @torch.no_grad()
    def average(self):
        for ema, decay in self.averages:
            torch._foreach_lerp_(
                list(ema.parameters()), list(self.generator.parameters()), 1 - decay
            )


class NoGradLoop(BareLoop):
    """The same without our savings; only the online phase's generator runs without gradient."""

    frozen_generator_gradient = False

    def __init__(self, cfg, teacher, batches, device):
        teacher = (
            copy.deepcopy(teacher).requires_grad_(True).to(memory_format=torch.contiguous_format)
        )
        super().__init__(cfg, teacher, batches, device)

    def optimizer(self, network, cfg):
        return super().optimizer(network, {**cfg, 'fused': False})

    def step(self):
        z, cond = self.draw()
        with torch.set_grad_enabled(self.frozen_generator_gradient):
            x_0 = self.generator(z, **cond)
        losses = [self.update('online', self.fm_loss(x_0, cond))]
        self.generator.zero_grad()
        if not self.shared:
            z, cond = self.draw()
        losses.append(self.update('generator', self.fgm_loss(self.generator(z, **cond), cond)))
        for network in (self.teacher, self.online):
            network.zero_grad()
        self.average()
        return losses

    @torch.no_grad()
    def average(self):
        for ema, decay in self.averages:
            for average, current in zip(ema.parameters(), self.generator.parameters()):
                average.copy_(decay * average + (1 - decay) * current)


class PlainLoop(NoGradLoop):
    """In the obvious way: gradients of frozen networks stay on in both phases."""

    frozen_generator_gradient = True


class RealUIDLoop(PlainLoop):
    """RealUID's own order, from its description: K online updates on fresh samples whose generator
    graph is kept, then the generator's, with the gradients of frozen networks on."""

    def __init__(self, cfg, teacher, batches, device):
        super().__init__(cfg, teacher, batches, device)
        self.updates = cfg.train_cfg.get('online_updates', 1)
        self.shared = False

    def step(self):
        for _ in range(self.updates - 1):
            z, cond = self.draw()
            self.update('online', self.fm_loss(self.generator(z, **cond), cond))
            self.generator.zero_grad()
        return super().step()


LOOPS = dict(bare=BareLoop, no_grad=NoGradLoop, plain=PlainLoop, realuid=RealUIDLoop)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Alternate(Hook):
    """From equal samples and noise both must have the same losses; then blocks of each are timed in
    turn, and what our phases take is noted, with ``breakdown`` the networks' forward passes too."""

    priority = 'LOWEST'

    def __init__(self, other, block, breakdown=False):
        self.other, self.block, self.breakdown = other, block, breakdown
        self.ours, self.theirs = [], []
        self.parts = defaultdict(list)
        self.passes = defaultdict(float)

    def watch(self, name, network):
        began = []
        network.register_forward_pre_hook(lambda *args: began.append(now()))

        def end(*args):
            self.passes[f'{name}, forward'] += now() - began.pop()

        network.register_forward_hook(end)

    def before_train(self, runner):
        model = runner.model
        if self.breakdown:
            for name, network in model.networks.items():
                self.watch(name, network)
        z, cond = self.other.draw()
        with torch.no_grad():
            # as copies of the teacher they would leave the generator nothing to follow
            for p, q in zip(model.online.parameters(), self.other.online.parameters()):
                p.add_(0.01 * torch.randn_like(p))
                q.copy_(p)
            x_0 = model.generator(z, **cond)
            for phase, theirs in (
                ('online', self.other.fm_loss),
                ('generator', self.other.fgm_loss),
            ):
                torch.manual_seed(0)
                losses = model.loss(phase, dict(x_0=x_0, cond=cond))
                a = sum(value for name, value in losses.items() if name.startswith('loss'))
                torch.manual_seed(0)
                b = theirs(x_0, cond)
                print(f'{phase} loss  ours {float(a):.6f}  theirs {float(b):.6f}')
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        self.passes.clear()
        self.start = now()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for phase, marks in runner.train_loop.record.marks.items():
            clock = runner.train_loop.clock
            if not clock.cuda or now():
                self.parts[f'{phase} phase'].append(sum(clock.seconds(*each) for each in marks))
        for name, seconds in self.passes.items():
            self.parts[name].append(seconds)
        self.passes.clear()
        if batch_idx % self.block == 0:
            middle = now()
            self.ours.append((middle - self.start) / self.block)
            for _ in range(self.block):
                self.other.step()
            self.start = now()
            self.theirs.append((self.start - middle) / self.block)


def build_ours(args, work_dir):
    """The runner of the config, ready to train."""
    cfg = read_config(args.config, args.cfg_options)
    # speed does not depend on the weights, so no teacher is needed; evaluations and pictures are
    # extra maths
    cfg.merge_from_dict(
        {
            'work_dir': work_dir,
            'launcher': 'none',
            'train_cfg.max_iters': args.iters + args.block + 1,
            'model.teacher.checkpoint': None,
            'log_level': 'WARNING',
        }
    )
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.train_dataloader.batch_size = args.batch_size or cfg.train_dataloader.batch_size
    cfg.evaluations = {}
    cfg.default_hooks.checkpoint.pop('save_best', None)
    cfg.default_hooks.pop('samples')
    runner = FlowRunner.from_cfg(cfg)
    runner.prepare()
    return runner


def build_theirs(args, runner):
    """The loop to compare with, on the same data in the same order."""
    cfg, teacher = runner.cfg, runner.model.teacher
    dataloader = {**copy.deepcopy(cfg.train_dataloader), 'collate_fn': dict(type=collate)}
    loader = runner.build_dataloader(dataloader, seed=cfg.randomness.seed)
    return LOOPS[args.baseline](cfg, teacher, iter(loader), next(teacher.parameters()).device)


def peak_memory(which):
    """GiB of one loop alone, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        *sys.argv[1:],
        '--only',
        which,
        '--iters',
        '2',
        '--block',
        '1',
    ]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def run_alone(args, work_dir):
    runner = build_ours(args, work_dir)
    if args.only == 'ours':
        runner.train()
    else:
        other = build_theirs(args, runner)
        other.teacher = copy.deepcopy(other.teacher)
        runner.model.to('meta')
        for _ in range(2):
            other.step()
    peak = (
        torch.cuda.max_memory_allocated() / 2**30
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    print(f'{peak:.2f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', nargs='?', default='configs/fgm/digits.py')
    parser.add_argument('--baseline', choices=list(LOOPS), default='bare')
    parser.add_argument('--batch-size', type=int, default=None, help="default: the config's")
    parser.add_argument('--iters', type=int, default=200)
    parser.add_argument('--block', type=int, default=10)
    parser.add_argument(
        '--memory', action='store_true', help='measure the peak memory of each loop too'
    )
    parser.add_argument(
        '--breakdown', action='store_true', help="time each network's forward passes too"
    )
    parser.add_argument('--only', choices=['ours', 'theirs'], default=None, help=argparse.SUPPRESS)
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='e.g. strategy.compile=True'
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work_dir:
        if args.only:
            return run_alone(args, work_dir)
        runner = build_ours(args, work_dir)
        hook = Alternate(build_theirs(args, runner), args.block, args.breakdown)
        runner.register_hook(hook)
        runner.train()
    # the first block warms up
    ours, theirs = statistics.median(hook.ours[1:]), statistics.median(hook.theirs[1:])
    ratio = statistics.median(a / b for a, b in zip(hook.ours[1:], hook.theirs[1:]))
    n = runner.train_loop.dataloader.batch_size
    print(f'{args.config}: batch {n}, {args.iters} iterations in blocks of {args.block}')
    for name, which, seconds in (
        (f'{args.baseline} loop', 'theirs', theirs),
        ('our loop with hooks', 'ours', ours),
    ):
        memory = f'  peak memory {peak_memory(which):6.2f} GiB' if args.memory else ''
        print(
            f'{name:20} {1000 * seconds:9.2f} ms an iteration  {n / seconds:8.2f} images/s{memory}'
        )
    print(f'ratio                {ratio:9.3f}')
    for part, seconds in hook.parts.items():
        print(f'{part:20} {1000 * statistics.median(seconds[1:]):9.2f} ms of ours')


if __name__ == '__main__':
    main()
