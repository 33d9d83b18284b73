# Copyright (c) mmfgm authors.
import copy
import math
from collections.abc import Mapping, Sequence

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.models import FGM
from mmfgm.processes import local
from mmfgm.registry import DATASETS, HOOKS

from .rng import get_rng_state, preserve_rng, set_rng_state

# what a healthy run keeps to; docs/troubleshooting.md shows runs that leave it
LIMITS = dict(
    gan_ratio=(1e-4, 1.0),
    d_accuracy=(0.55, 0.98),
    # the run of shapes_small whose samples are the better the longer it runs passes 0.053
    saturation=(0.0, 0.1),
    online_lag=(-math.inf, 0.1),
)
ADVICE = {
    'gan_ratio_low': 'the adversarial term does not reach the generator; raise'
    ' model.gan.generator_weight, or leave model.gan out',
    'gan_ratio_high': 'the adversarial term outweighs the loss that follows the teacher; lower'
    ' model.gan.generator_weight',
    'd_accuracy_low': 'the discriminator cannot tell real from generated samples and says nothing;'
    ' raise optim_wrapper.discriminator.optimizer.lr, or give it less noise by'
    ' model.gan.time_sampler',
    'd_accuracy_high': 'the discriminator tells every sample apart; lower'
    ' optim_wrapper.discriminator.optimizer.lr, or give it more noise by model.gan.time_sampler',
    'saturation_high': 'samples leave the range of the data; lower model.guidance.scale or the'
    " generator's learning rate, or rescale the guidance",
    'online_lag_high': 'the online network is behind the generator; raise'
    ' train_cfg.online_updates or optim_wrapper.online.optimizer.lr, or lower that of the'
    ' generator',
}


@HOOKS.register_module()
class WatchHook(Hook):
    """Signs that a distillation goes wrong while its losses look well, warned about by name.

    At each interval, ``watch/NAME`` goes to the visualizer:

    - ``saturation``: the share of the numbers of generated samples beyond ``bound``;
    - ``gan_ratio``: norm of the adversarial term's gradient on the samples by that of the other
      one, over the last log window, and ``d_accuracy`` over the same;
    - ``online_lag`` (with ``lag_updates``): by how much the flow-matching loss of the online
      network on unseen generated samples falls, as a share, if it alone is trained on with its own
      optimizer, so that a rate which is too low shows none. Its weights and its optimizer are put
      back: training is bit for bit what it is without the hook.

    A value that leaves its limits is warned about, once until it has come back.

    Args:
        dataset (dict): Config of the items to generate, of which there are at least two batches
            with ``lag_updates``.
        interval (int): Iterations between two looks. Defaults to 200.
        bound (float): Of samples in the space where they are generated. Defaults to 1.2, for pixels
            in [-1, 1]; latents of unit variance reach 5.
        batch_size (int): Of the samples. Defaults to 64.
        lag_updates (int): Updates of the online network to measure its lag by; each costs what one
            of training does. Defaults to 0: not measured.
        limits (dict[str, Sequence[float]], optional): Lowest and highest healthy values by name.
            Defaults to ``LIMITS``, which it updates.

    Raises:
        UsageError: If a limit has no such name, there are too few items, or the model is not FGM.
    """

    priority = 'LOW'

    def __init__(
        self,
        dataset: dict,
        interval: int = 200,
        bound: float = 1.2,
        batch_size: int = 64,
        lag_updates: int = 0,
        limits: Mapping[str, Sequence[float]] | None = None,
    ):
        unknown = sorted(set(limits or ()) - set(LIMITS))
        if unknown:
            raise UsageError(
                f'expected WatchHook.limits of {list(LIMITS)}, found {unknown}; name some of them'
            )
        self.limits = {**LIMITS, **{name: tuple(pair) for name, pair in (limits or {}).items()}}
        self.dataset = DATASETS.build(dataset)
        self.interval = interval
        self.bound = bound
        self.batch_size = batch_size
        self.lag_updates = lag_updates
        needed = 2 * batch_size if lag_updates else 1
        if len(self.dataset) < needed:
            raise UsageError(
                f'expected WatchHook.dataset of at least {needed} items, found'
                f' {len(self.dataset)}; raise its number, or lower batch_size'
            )
        self._out: set[str] = set()

    def before_run(self, runner):
        if not isinstance(runner.model, FGM):
            raise UsageError(
                f'WatchHook watches FGM and its generator, found {type(runner.model).__name__};'
                ' leave it out: default_hooks.watch=None'
            )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.every_n_train_iters(runner, self.interval):
            return
        values = self._of_the_log(runner)
        with preserve_rng(), runner.model.autocast():
            batch = self._batch(runner.model, runner.iter, 0)
            beyond = (batch['x_0'].abs() > self.bound).float().mean()
            all_reduce(beyond, 'mean')
            values['saturation'] = float(beyond)
            if self.lag_updates:
                values['online_lag'] = self._lag(runner, batch)
        runner.visualizer.add_scalars(
            {f'watch/{name}': value for name, value in values.items()}, step=runner.iter + 1
        )
        for name, value in values.items():
            runner.message_hub.update_scalar(f'val/watch/{name}', value)
            self._judge(runner, name, value)

    def _of_the_log(self, runner) -> dict[str, float]:
        """What the training measured anyway, as means over the window of the log."""
        window = runner.log_processor.window_size
        known = runner.message_hub.log_scalars

        def mean(name: str) -> float | None:
            return known[f'train/{name}'].mean(window) if f'train/{name}' in known else None

        values: dict[str, float] = {}
        fgm, gan = mean('generator/grad_x_0_fgm'), mean('generator/grad_x_0_gan')
        if fgm and gan is not None:
            values['gan_ratio'] = gan / fgm
        accuracy = mean('online/d_accuracy')
        if accuracy is not None:
            values['d_accuracy'] = accuracy
        return values

    def _batch(self, model: FGM, iteration: int, k: int) -> dict:
        """Samples of the generator as it is now, for other items at each look."""
        count = min(self.batch_size, len(self.dataset))
        look = iteration * (self.lag_updates + 1) + k
        first = (look * get_world_size() + get_rank()) * count
        batch = self.dataset.__getitems__([(first + i) % len(self.dataset) for i in range(count)])
        sampler = model.sampler
        inputs = sampler.preprocess({**batch, 'z': sampler.noise(batch['seed'])})
        cond = inputs.get('cond', {})
        with torch.no_grad():
            # not what a decoder makes of it
            return dict(**model.generate(inputs['z'], cond), cond=cond)

    def _lag(self, runner, unseen: dict) -> float:
        model, wrapper = runner.model, runner.optim_wrapper['online']
        weights = [local(p).detach().clone() for p in model.online.parameters()]
        optimizer = copy.deepcopy(wrapper.optimizer.state_dict())
        noise = get_rng_state()
        before = self._loss(model, unseen)
        for k in range(1, self.lag_updates + 1):
            samples = self._batch(model, runner.iter, k)
            sum(self._terms(model, samples)).backward()
            wrapper.optimizer.step()
            wrapper.optimizer.zero_grad()
        # the same times and noise as before: they vary the loss more than a few updates do
        set_rng_state(noise)
        after = self._loss(model, unseen)
        with torch.no_grad():
            for p, kept in zip(model.online.parameters(), weights):
                local(p).copy_(kept)
        wrapper.optimizer.load_state_dict(optimizer)
        return 1 - after / before

    @staticmethod
    def _terms(model: FGM, samples: dict) -> list[Tensor]:
        losses = model.online_loss(samples['x_0'], samples['cond'], step=samples.get('step'))
        return [value for name, value in losses.items() if 'loss' in name]

    def _loss(self, model: FGM, samples: dict) -> float:
        with torch.no_grad():
            loss = sum(self._terms(model, samples))
        all_reduce(loss, 'mean')
        return float(loss)

    def _judge(self, runner, name: str, value: float) -> None:
        low, high = self.limits[name]
        sign = f'{name}_low' if value < low else f'{name}_high' if value > high else ''
        if sign and sign not in self._out:
            runner.logger.warning(
                f'{sign}: {name} is {value:.3g}, of a healthy run in [{low:g}, {high:g}]:'
                f' {ADVICE.get(sign, "look at the samples")}. docs/troubleshooting.md shows it'
            )
        self._out -= {f'{name}_low', f'{name}_high'}
        self._out |= {sign} - {''}
