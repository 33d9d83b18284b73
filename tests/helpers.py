# Copyright (c) mmfgm authors.
"""Hooks and models that tests name in configs (``custom_imports``)."""

import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from mmfgm.evaluation import to_uint8
from mmfgm.models import FGM
from mmfgm.processes import local
from mmfgm.registry import HOOKS, MODELS, TASK_UTILS


@HOOKS.register_module()
class KillHook(Hook):
    """SIGKILL this process at an iteration: before its checkpoint, while it is written, or after
    it."""

    def __init__(self, at, when, rank=0):
        self.at, self.when, self.rank = at, when, rank
        self.priority = 'HIGHEST' if when == 'before' else 'LOWEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.when == 'while' and runner.iter + 1 == self.at and get_rank() == self.rank:
            mock.patch('os.replace', lambda *args: os.kill(os.getpid(), signal.SIGKILL)).start()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at and get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class SlowDiskHook(Hook):
    """Shards of checkpoints take their time, so that iterations pass while they are written."""

    def __init__(self, seconds):
        self.seconds = seconds

    def before_train(self, runner):
        save = dcp.save

        def slow(*args, **kwargs):
            time.sleep(self.seconds)
            return save(*args, **kwargs)

        mock.patch('torch.distributed.checkpoint.save', slow).start()


@HOOKS.register_module()
class DiskHook(Hook):
    """The disk is full from an iteration on (a limit on the size of files stands for it), or the
    work dir is deleted."""

    def __init__(self, at, deleted=False, limit=20000):
        self.at, self.deleted, self.limit = at, deleted, limit

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 != self.at:
            return
        if self.deleted:
            shutil.rmtree(runner.work_dir)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@HOOKS.register_module()
class SayHook(Hook):
    """Say when an iteration begins."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        print('iteration begins', flush=True)


@HOOKS.register_module()
class PoisonHook(Hook):
    """Make one weight of a network nan before an iteration."""

    def __init__(self, at, network):
        self.at, self.network = at, network

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.at:
            with torch.no_grad():
                next(getattr(runner.model, self.network).parameters()).view(-1)[0] = float('nan')


@HOOKS.register_module()
class RecordHook(Hook):
    """Write down what each process measures: its losses, and the bytes it holds of the teacher."""

    def before_train(self, runner):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        values = runner.train_loop.record.values
        self.losses.append({key: float(value) for key, value in values.items() if 'loss' in key})

    def after_train(self, runner):
        held = sum(local(p).nbytes for p in runner.model.teacher.parameters())
        with open(f'{runner.work_dir}/rank_{get_rank()}.json', 'w') as f:
            json.dump(dict(losses=self.losses, base_bytes=held), f)


@HOOKS.register_module()
class GradientDtypeHook(Hook):
    """Blocks must compute in bf16, and every gradient the optimizers see must be float32."""

    def before_train(self, runner):
        self.computed_in = set()
        for module in runner.model.modules():
            if type(module).__name__.endswith('AdaLNBlock'):
                module.mlp[0].register_forward_hook(
                    lambda module, args, out: self.computed_in.add(out.dtype)
                )
        for wrapper in runner.optim_wrapper.values():
            step = wrapper.optimizer.step

            def checked(*args, optimizer=wrapper.optimizer, step=step, **kwargs):
                grads = [
                    p.grad
                    for group in optimizer.param_groups
                    for p in group['params']
                    if p.grad is not None
                ]
                assert grads and all(grad.dtype == torch.float32 for grad in grads)
                return step(*args, **kwargs)

            wrapper.optimizer.step = checked

    def after_train(self, runner):
        assert self.computed_in == {torch.bfloat16}, self.computed_in


@TASK_UTILS.register_module()
class SmallConvFeatures:
    """A random convolution, pooled: Inception's part where numbers need not mean anything."""

    name = 'small conv'
    dim = 16

    def __call__(self, samples):
        weight = torch.randn(self.dim, 3, 5, 5, generator=torch.Generator().manual_seed(0)) / 8
        return (
            torch.nn.functional.conv2d(to_uint8(samples).float() / 127.5 - 1, weight, stride=3)
            .relu()
            .mean((2, 3))
        )


@TASK_UTILS.register_module()
class SlowPixels:
    """Pixels of a generated image, one in a tenth of a second, each said aloud."""

    name = 'slow pixels'
    dim = 64

    def __call__(self, samples):
        if len(samples) == 1:  # the reference comes in larger batches
            print('measuring', flush=True)
            time.sleep(0.1)
        return samples.flatten(1)


@contextmanager
def row_noise(idx, salt):
    """Replace torch's noise by noise that depends on each row's idx, whoever computes it."""
    calls = iter(range(1000))

    def rows(shape, draw):
        call = next(calls)
        ids = [int(i) for i in idx]
        # a discriminator sees real samples and generated ones, both of these items
        ids = ids if shape[0] == len(ids) else [~i for i in ids] + ids
        assert shape[0] == len(ids)
        return torch.stack(
            [
                draw(shape[1:], torch.Generator().manual_seed(hash((i, salt, call)) % 2**31))
                for i in ids
            ]
        )

    def choices(values, weights, k):
        call = next(calls)
        assert k == len(idx)
        draws = [random.Random(hash((int(i), salt, call))) for i in idx]
        return [draw.choices(values, weights)[0] for draw in draws]

    def randn(*shape, device=None, generator=None, dtype=None):
        return rows(shape, lambda s, g: torch.randn(s, generator=g))

    with (
        mock.patch('torch.randn', randn_guard(randn)),
        mock.patch('torch.randn_like', lambda x: randn_rows(rows, x.shape)),
        mock.patch('random.choices', choices),
    ):
        yield


def randn_guard(randn):
    original = torch.randn

    def patched(*shape, generator=None, **kwargs):
        # the per-row draws themselves come with a generator
        if generator is not None:
            return original(*shape, generator=generator, **kwargs)
        return randn(*shape, **kwargs)

    return patched


def randn_rows(rows, shape):
    return rows(shape, lambda s, g: torch.randn(s, generator=g))


@MODELS.register_module()
class RowNoiseFGM(FGM):
    """FGM whose noise belongs to the sample, so that runs with different numbers of processes are
    comparable."""

    def prepare(self, batch, differentiable):
        with row_noise(batch['idx'], 0):
            return super().prepare(batch, differentiable)

    def loss(self, phase, samples):
        with row_noise(samples['idx'], 1 + list(self.phases).index(phase)):
            return super().loss(phase, samples)

    def joint_loss(self, samples):
        with row_noise(samples['idx'], 1 + len(self.phases)):
            return super().joint_loss(samples)
