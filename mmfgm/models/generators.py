# Copyright (c) mmfgm authors.
"""The maps from noise to samples around a velocity network.

A generator is called as ``generator(z, **cond)``, in training too. One that samples in several
calls says how many it takes at most, ``max_nfe``, and is then called as ``generator(z, nfe, eps,
**cond)`` to sample. For training it draws the step of each sample, ``draw_steps(n)``, and takes it,
``generator(z, steps=steps, **cond)``.
"""

import copy
import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmfgm.flow import LinearPath, expand_t, shift_time

from .lora import without_adapters

# of a generator; an export that names more was not made by us
MOST_STEPS = 1000


class OneStepGenerator(nn.Module):
    """``x_0 = c_skip z - c_out v(c_in z, t*)`` (Eq. B.1): one network call from noise to data.

    The defaults are the usual choice ``t* = 1``; the paper's SD3 generator (Eq. B.2) is
    ``t_star=0.97, c_in=0.8``, and its ablation C.1 is ``c_out=1`` with ``t_star`` in [0, 1]. Eq.
    5.1 is printed for the opposite sign of the velocity; in ours it is ``c_skip = c_out = c_in =
    t*``, one denoising step of the teacher from ``t*``.

    Args:
        network (nn.Module): The velocity network, usually a copy of the teacher's.
        t_star (float): The fixed time the network is called at, in [0, 1]. Defaults to 1.
        c_skip (float): Defaults to 1.
        c_out (float, optional): Defaults to ``t_star``.
        c_in (float): Defaults to 1.

    Raises:
        ValueError: If ``t_star`` is outside [0, 1], or ``c_out`` is 0.
    """

    def __init__(
        self,
        network: nn.Module,
        t_star: float = 1.0,
        c_skip: float = 1.0,
        c_out: float | None = None,
        c_in: float = 1.0,
    ):
        super().__init__()
        if not 0 <= t_star <= 1:
            raise ValueError(f't_star must lie in [0, 1] (0 is data, 1 is noise), but got {t_star}')
        self.t_star = t_star
        self.c_skip = c_skip
        self.c_out = t_star if c_out is None else c_out
        self.c_in = c_in
        if self.c_out == 0:
            raise ValueError(
                f'c_out is 0 (t_star={t_star}, c_out={c_out}), so the network could not change the '
                'output; set c_out, for example to 1 as in the ablation C.1 of the paper'
            )
        self.network = network

    def forward(self, z: Tensor, **cond) -> Tensor:
        """Map noise ``z (N, *event)`` to samples ``x_0 (N, *event)``."""
        t = torch.full((len(z),), self.t_star, device=z.device)
        return self.c_skip * z - self.c_out * self.network(self.c_in * z, t, **cond)


class _SeveralSteps(nn.Module):
    """How a generator of several steps is called. It samples with some number of them, and each
    sample of a training is made at a step of its own.

    Attributes:
        weights (tuple[float, ...]): In which proportion the steps are trained.
        max_nfe (int): Network calls of a sample at most; any number from 1 is possible.
    """

    weights: tuple[float, ...]
    max_nfe: int

    def draw_steps(self, n: int) -> list[int]:
        """The step at which each of ``n`` samples is trained, from 0; a single one is not drawn.

        It is drawn by python, so that no step waits for the device to say how many samples take it.
        """
        if len(self.weights) == 1:
            return [0] * n
        return random.choices(range(len(self.weights)), self.weights, k=n)

    def forward(
        self,
        z: Tensor,
        nfe: int | None = None,
        eps: Tensor | None = None,
        steps: Sequence[int] | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Map noise to samples: at a step of each, as training needs it, or with ``nfe`` calls.

        Args:
            z (Tensor): Noise, ``(N, *event)``.
            nfe (int, optional): How many of the steps, from the first on, samples take. Defaults to
                ``steps``, of which only the last call has a gradient.
            eps (Tensor, optional): The noise between ``nfe`` calls, ``(nfe - 1, N, *event)``, where
                estimates are noised again. Without it each is noised by the noise that it was taken
                from, which is deterministic: of a teacher's network, Euler's method.
            steps (Sequence[int], optional): Whose estimate each sample is, from 0. Defaults to
                those of :meth:`draw_steps`.
            **cond (Tensor): Conditions, ``(N, ...)``.

        Returns:
            Tensor: ``x_0 (N, *event)``.
        """
        if nfe is not None:
            return self._sample(z, nfe, eps, cond)
        return self._trained(z, list(self.draw_steps(len(z)) if steps is None else steps), cond)

    def _sample(self, z: Tensor, nfe: int, eps: Tensor | None, cond: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def _trained(self, z: Tensor, steps: list[int], cond: dict[str, Tensor]) -> Tensor:
        """Each sample at its step, the steps before it without gradient."""
        raise NotImplementedError


class FewStepGenerator(_SeveralSteps):
    """``x_0 = c_skip x_t - c_out v(c_in x_t, t)`` at a few times ``t_1 > ... > t_K``: the first
    step takes noise, each further one the estimate before it, noised again to its own time.

    By default every step is the estimate of the network, ``x_0 = x_t - t v(x_t, t)``. With one time
    this is :class:`OneStepGenerator`, random numbers included.

    A sample is trained at one step, drawn for it alone. What that step takes is made as sampling
    makes it, by the generator itself and without gradient (backward simulation, Yin et al., 2024).

    Args:
        network (nn.Module): The velocity network, usually a copy of the teacher's.
        times (int | Sequence[float]): Decreasing, in (0, 1]; or how many, evenly spaced from 1 to
            ``1 / times``. Defaults to 4.
        shift (float): Moves the evenly spaced times, ``t -> shift t / (1 + (shift - 1) t)`` (Esser
            et al., 2024, Eq. 23). Defaults to 1, which moves none.
        weights (Sequence[float], optional): In which proportion the steps are trained. Defaults to
            equal ones.
        c_skip (float | Sequence[float]): For all steps, or one for each. Defaults to 1.
        c_out (float | Sequence[float], optional): Likewise. Defaults to ``times``.
        c_in (float | Sequence[float]): Likewise. Defaults to 1. The first step takes noise as it
            is: where ``t_1`` is below 1, its ``c_in`` says what stands for ``x_t``.

    Attributes:
        max_nfe (int): Network calls of a sample at most, K; any number from 1 is possible.

    Raises:
        ValueError: If times are not decreasing or outside (0, 1], a shift is not positive or has
            given times to move, or a list is not of one number for each time.
    """

    def __init__(
        self,
        network: nn.Module,
        times: int | Sequence[float] = 4,
        shift: float = 1.0,
        weights: Sequence[float] | None = None,
        c_skip: float | Sequence[float] = 1.0,
        c_out: float | Sequence[float] | None = None,
        c_in: float | Sequence[float] = 1.0,
    ):
        super().__init__()
        self.times = _spaced(times, shift) if isinstance(times, int) else tuple(times)
        if not isinstance(times, int) and shift != 1:
            raise ValueError(
                f'expected no shift of given times, found shift={shift} beside {self.times}; shift'
                ' them yourself, or give their number'
            )
        ordered = all(a > b for a, b in pairwise(self.times))
        if not (self.times and ordered and self.times[0] <= 1 and self.times[-1] > 0):
            raise ValueError(
                f'expected decreasing times in (0, 1] (0 is data, 1 is noise), found {self.times};'
                ' for four evenly spaced ones write times=4'
            )
        self.max_nfe = len(self.times)
        self.c_skip = self._one_for_each_time('c_skip', c_skip)
        self.c_out = self._one_for_each_time('c_out', self.times if c_out is None else c_out)
        self.c_in = self._one_for_each_time('c_in', c_in)
        if 0 in self.c_out:
            raise ValueError(
                f'expected c_out other than 0, found {self.c_out}, with which the network could not'
                ' change the output; leave it out for c_out = times'
            )
        self.weights = self._one_for_each_time('weights', 1.0 if weights is None else weights)
        _check_weights(self.weights)
        self.network = network

    def _one_for_each_time(self, name: str, values: float | Sequence[float]) -> tuple[float, ...]:
        if not isinstance(values, Sequence):
            values = [values] * self.max_nfe
        if len(values) != self.max_nfe:
            raise ValueError(
                f'expected {name} of one number for each of the {self.max_nfe} times, found'
                f' {tuple(values)}; give as many, or a single one for all'
            )
        return tuple(values)

    def _trained(self, z: Tensor, steps: list[int], cond: dict[str, Tensor]) -> Tensor:
        k = torch.tensor(steps, device=z.device)
        return self._estimate(self._simulate(z, steps, k, cond), k, cond)

    def _estimate(self, x_t: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """``x_0`` by the step ``k (N,)`` of each sample (Eq. B.1)."""
        t = _look_up(self.times, k, torch.float32)
        c_skip, c_out, c_in = (
            expand_t(_look_up(values, k, x_t.dtype), x_t)
            for values in (self.c_skip, self.c_out, self.c_in)
        )
        return c_skip * x_t - c_out * self.network(c_in * x_t, t, **cond)

    @torch.no_grad()
    def _simulate(self, z: Tensor, steps: list[int], k: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """``x_t (N, *event)`` at the step of each sample, ``k (N,)`` on the device, by the steps
        before it."""
        x_t = z.clone()
        for i, t in enumerate(self.times[1:]):
            eps = torch.randn_like(z)
            rows, going_on = _going_on(steps, k, i)
            x_0 = self._estimate(x_t[rows], torch.full_like(rows, i), _take(cond, rows))
            x_next = LinearPath.interpolate(x_0, eps[rows], torch.full_like(rows, t, dtype=z.dtype))
            x_t[rows[:going_on]] = x_next[:going_on]
        return x_t

    def _sample(self, z: Tensor, nfe: int, eps: Tensor | None, cond: dict[str, Tensor]) -> Tensor:
        x_t = z
        # noise alone is at t = 1, wherever the network takes it to be
        t = z.new_ones(len(z))
        for i in range(nfe):
            k = torch.full((len(z),), i, device=z.device)
            x_0 = self._estimate(x_t, k, cond)
            if i + 1 < nfe:
                v = LinearPath.velocity_from_x_0(x_t, x_0, t)
                noise = LinearPath.eps_from_velocity(x_t, v, t) if eps is None else eps[i]
                t = _look_up(self.times, k + 1, z.dtype)
                x_t = LinearPath.interpolate(x_0, noise, t)
        return x_0


class DataSpaceGenerator(_SeveralSteps, OneStepGenerator):
    """One step from the same noise, made again and again: each call is given the estimate of the
    one before and its number.

    Both are inputs that start at zero, so that all steps begin as :class:`OneStepGenerator`: to
    what the network's first layer makes of ``c_in z``, a layer like it adds what it makes of the
    estimate, and each step a bias of its own. Steps stay in the space of data, where nothing is
    noised again (2610.12102).

    A sample is trained at one step, drawn for it alone, after the steps before it without gradient,
    as :class:`FewStepGenerator` is.

    Args:
        network (nn.Module): The velocity network; its ``input_layer`` is the linear layer or
            convolution that takes ``x_t``, as it is or flat.
        steps (int): Defaults to 4.
        weights (Sequence[float], optional): In which proportion the steps are trained. Defaults to
            equal ones.
        **coefficients (float): ``t_star, c_skip, c_out, c_in`` of :class:`OneStepGenerator`.

    Attributes:
        max_nfe (int): Network calls of a sample at most; any number from 1 is possible.

    Raises:
        ValueError: If the network does not name its input layer, there is no step, or weights are
            not one for each.
    """

    def __init__(
        self,
        network: nn.Module,
        steps: int = 4,
        weights: Sequence[float] | None = None,
        **coefficients: float,
    ):
        super().__init__(network, **coefficients)
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f'expected 1 to {MOST_STEPS} steps, found {steps}; write steps=4')
        self.weights = tuple([1.0] * steps if weights is None else weights)
        if len(self.weights) != steps:
            raise ValueError(
                f'expected a weight for each of the {steps} steps, found {weights}; leave weights'
                ' out to train all alike'
            )
        _check_weights(self.weights)
        self.max_nfe = steps
        # coefficients alone are asked for without a network
        if not isinstance(network, nn.Identity):
            self._extend(network)

    def _extend(self, network: nn.Module) -> None:
        layer = getattr(network, 'input_layer', None)
        if layer is None:
            raise ValueError(
                f'expected a network with an input_layer, to which the estimate is added, found'
                f' {type(network).__name__}; give it that property, or use FewStepGenerator'
            )
        self.estimate_layer = copy.deepcopy(layer)
        self.estimate_layer.bias = None
        nn.init.zeros_(self.estimate_layer.weight)
        self.step_biases = nn.Parameter(layer.weight.new_zeros(self.max_nfe, len(layer.weight)))
        self._given: tuple[Tensor, Tensor] | None = None
        layer.register_forward_hook(self._add_estimate)

    def _add_estimate(self, layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        if self._given is None:
            return out
        estimate, k = self._given
        (x_t,) = inputs
        if x_t.shape[0] != len(k) or x_t[0].numel() != estimate[0].numel() or x_t.ndim == 3:
            raise ValueError(
                f'expected an input_layer that takes x_t {tuple(estimate.shape)} as it is or flat,'
                f' found that it is given {tuple(x_t.shape)}; this network packs x_t into tokens:'
                ' use FewStepGenerator'
            )
        made = self.estimate_layer(estimate.reshape(x_t.shape).to(x_t.dtype))
        return out + made + _for_each_place(self.step_biases[k], layer, out)

    def _sample(self, z: Tensor, nfe: int, eps: Tensor | None, cond: dict[str, Tensor]) -> Tensor:
        # nothing is noised again
        estimate = torch.zeros_like(z)
        for i in range(nfe):
            estimate = self._step(z, estimate, torch.full((len(z),), i, device=z.device), cond)
        return estimate

    def _trained(self, z: Tensor, steps: list[int], cond: dict[str, Tensor]) -> Tensor:
        k = torch.tensor(steps, device=z.device)
        return self._step(z, self._simulate(z, steps, k, cond), k, cond)

    def _step(self, z: Tensor, estimate: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """``x_0`` by the step ``k (N,)`` of each sample."""
        self._given = (estimate, k)
        try:
            return OneStepGenerator.forward(self, z, **cond)
        finally:
            self._given = None

    @torch.no_grad()
    def _simulate(self, z: Tensor, steps: list[int], k: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The estimate that the step of each sample is given, by the steps before it."""
        estimate = torch.zeros_like(z)
        for i in range(self.max_nfe - 1):
            rows, going_on = _going_on(steps, k, i)
            made = self._step(z[rows], estimate[rows], torch.full_like(rows, i), _take(cond, rows))
            estimate[rows[:going_on]] = made[:going_on]
        return estimate


class StepBiases(nn.Embedding):
    """Tells a network which step of a generator made each sample: a bias of each step, added to
    what the network's first layer makes of ``x_t``. All start at 0.

    It becomes a part of the network, ``step_biases``, which then takes ``step (N,)`` beside its
    conditions; without ``step`` nothing is added.

    Args:
        network (nn.Module): Its ``input_layer`` is the linear layer or convolution that takes
            ``x_t``.
        steps (int): Of the generator.

    Raises:
        ValueError: If the network does not name its input layer.
    """

    def __init__(self, network: nn.Module, steps: int):
        layer = getattr(without_adapters(network), 'input_layer', None)
        if layer is None:
            raise ValueError(
                'expected a network with an input_layer, which is told the step of each sample,'
                f' found {type(network).__name__}; give it that property, or set'
                ' model.step_aware=False'
            )
        super().__init__(steps, len(layer.weight), device=layer.weight.device)
        nn.init.zeros_(self.weight)
        self._step: Tensor | None = None
        network.add_module('step_biases', self)
        network.register_forward_pre_hook(self._take, with_kwargs=True)
        network.register_forward_hook(self._forget, always_call=True)
        layer.register_forward_hook(self._add)

    def _take(self, network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._step = kwargs.pop('step', None)
        return args, kwargs

    def _forget(self, network: nn.Module, args: tuple, out: Tensor) -> None:
        self._step = None

    def _add(self, layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        if self._step is None:
            return out
        return out + _for_each_place(self(self._step), layer, out)


def _for_each_place(rows: Tensor, layer: nn.Module, out: Tensor) -> Tensor:
    """A vector ``(N, D)`` of each sample, as it is added to a layer's output of tokens or maps."""
    if len(out) != len(rows):  # the tokens of all samples, one after the other
        rows = rows.repeat_interleave(len(out) // len(rows), 0)
    places = [1] * (out.ndim - 2)
    shape = (*rows.shape, *places) if isinstance(layer, nn.Conv2d) else (len(rows), *places, -1)
    return rows.to(out.dtype).view(shape)


def _check_weights(weights: tuple[float, ...]) -> None:
    if min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f'expected weights of at least 0 and one above, found {weights}; leave'
            ' them out to train all steps alike'
        )


def _going_on(steps: list[int], k: Tensor, i: int) -> tuple[Tensor, int]:
    """Which samples are trained behind step ``i``, and how many these are.

    Sharded networks must be called equally often on every process: where no sample goes on, one
    comes along for nothing.
    """
    going_on = sum(step > i for step in steps)
    return k.argsort(descending=True)[: max(going_on, 1)], going_on


def _take(cond: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in cond.items()}


def _spaced(count: int, shift: float) -> tuple[float, ...]:
    if not 1 <= count <= MOST_STEPS or shift <= 0:
        raise ValueError(
            f'expected 1 to {MOST_STEPS} times and a positive shift, found times={count},'
            f' shift={shift}; for four times write times=4'
        )
    return tuple(shift_time(1 - i / count, shift) for i in range(count))


def _look_up(values: Sequence[float], k: Tensor, dtype: torch.dtype) -> Tensor:
    """``values[k]``, shape ``(N,)``, filled in on the device of ``k``: a copy would wait for it."""
    found = torch.full(k.shape, values[0], dtype=dtype, device=k.device)
    for i, value in enumerate(values[1:], 1):
        found = found.masked_fill(k == i, value)
    return found
