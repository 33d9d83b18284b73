# Copyright (c) mmfgm authors.
"""Whether our ODE with somebody's weights is what their stock pipeline computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance, euler
from mmfgm.models.families import DiffusersFamily, diffusers_module, find, load_or_explain

PROMPTS = ('a red cat', 'the blue house on a green tree')
# of times, which are rounded to float32 on both sides
SAME_TIME = 1e-5


@dataclass
class TeacherCheck:
    """What a comparison found.

    Attributes:
        family (str): Title of the model's family.
        times (Tensor), stock_times (Tensor): Ours and the pipeline's, ``(steps + 1,)``.
        differences (list[float]): After each step, the largest difference of two latents by the
            standard deviation of the pipeline's.
        tolerance (float): What they may be.
        notes (list[str]): What was done besides, and where the two part and why.
    """

    family: str
    times: Tensor
    stock_times: Tensor
    tolerance: float
    differences: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return max(self.differences) <= self.tolerance

    def __str__(self) -> str:
        rows = [f'{self.family}, latents after each step:', 'step  t       pipeline t  difference']
        pairs = zip(self.times[:-1].tolist(), self.stock_times[:-1].tolist(), self.differences)
        rows += [
            f'{i:<4}  {ours:<6.4f}  {theirs:<10.4f}  {difference:.2g}'
            for i, (ours, theirs, difference) in enumerate(pairs, 1)
        ]
        first = next((i for i, d in enumerate(self.differences, 1) if not d <= self.tolerance), 0)
        end = f'equal to {self.tolerance:g}' if self.equal else f'they part at step {first}'
        return '\n'.join([*rows, *self.notes, end])


@torch.no_grad()
def check_teacher(
    model: str,
    prompts: Sequence[str] = PROMPTS,
    steps: int = 8,
    guidance: float | None = None,
    latent_size: int | None = None,
    max_length: int | None = None,
    dtype: str = 'float32',
    device: str = 'cpu',
    tolerance: float = 1e-3,
) -> TeacherCheck:
    """Integrate a model from the same noise, by our network, prompts, guidance and times, and by
    its stock pipeline, which shares the weights.

    Args:
        model (str): Folder in diffusers' format, or id on the hub.
        prompts (Sequence[str]): One image each.
        steps (int): Of Euler's method. Defaults to 8.
        guidance (float, optional): Scale of two passes. Defaults to the pipeline's own.
        latent_size (int, optional): Height and width of latents. Defaults to the network's.
        max_length (int, optional): Tokens of a prompt. Defaults to the pipeline's.
        dtype (str): Of the weights. Defaults to ``'float32'``.
        device (str): Defaults to ``'cpu'``.
        tolerance (float): Differences up to it are none, in standard deviations of the latents.

    Raises:
        UsageError: If the model is of no family, is no flow model, cannot be loaded, or has no
            guidance of two passes to scale.
    """
    family = find(model)
    if not isinstance(family, DiffusersFamily):
        raise UsageError(
            f'expected a family over a pipeline of diffusers, found {family.title}; check it by'
            ' its own tests'
        )
    options: dict[str, Any] = {} if latent_size is None else dict(latent_size=latent_size)
    network = family.load(model, dtype=dtype, **options).eval().to(device)
    limit = {} if max_length is None else dict(max_length=max_length)
    encoder = family.encoder(model, dtype=dtype, **limit).to(device)
    pipeline, notes = _stock(family, model, network, encoder.components, dtype)
    own = family.stock_scale(pipeline)
    if guidance is not None and own is None:
        raise UsageError(
            f'{model!r} makes one pass, in which guidance is an input or was distilled away, found'
            f' --guidance {guidance}; leave it out'
        )
    scale = own if guidance is None else guidance
    cond, null = encoder.encode(prompts), family.null(encoder)

    def to_null(cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.expand_as(cond[name]) for name, value in null.items()}

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        if scale is None:
            return network(x_t, t, **cond)
        guide = ClassifierFreeGuidance(scale, to_null, **family.guidance_options)
        return guide(network, x_t, t, cond)

    seeded = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    z = torch.stack([torch.randn(network.event_shape, generator=g) for g in seeded]).to(device)
    theirs = _integrate_stock(
        pipeline,
        family.to_stock(z).to(getattr(torch, dtype)),
        prompt=list(prompts),
        num_inference_steps=steps,
        **({} if max_length is None else dict(max_sequence_length=max_length)),
        **family.stock_options(pipeline, network, scale, len(prompts)),
    )
    expected = [family.from_stock(latents, z).float() for latents in theirs]
    stock_times = pipeline.scheduler.sigmas.float().cpu()
    times = family.stock_times(steps, network, model)
    check = TeacherCheck(family.title, times, stock_times, tolerance, notes=notes)
    check.differences = _differences(velocity, z, times.to(device), expected)
    if not check.equal:
        check.notes += _explain(
            check, family, network, velocity, z, expected, (cond, to_null(cond))
        )
    return check


def _stock(
    family: DiffusersFamily, model: str, network: nn.Module, parts: dict[str, Any], dtype: str
) -> tuple[Any, list[str]]:
    """The pipeline, around our weights, and what had to be changed in it."""
    shared = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    shared[family.subfolder] = getattr(network, family.attribute)
    pipeline = load_or_explain(
        lambda: family.pipeline_type().from_pretrained(
            model, torch_dtype=getattr(torch, dtype), **shared
        ),
        model,
        family.title,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(next(network.parameters()).device)
    scheduler, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    wanted = 'FlowMatchEulerDiscreteScheduler'
    if scheduler == wanted:
        return pipeline, []
    if config.get('prediction_type') != 'flow_prediction':
        raise UsageError(
            f'{model!r} has a {scheduler} with prediction_type={config.get("prediction_type")!r},'
            f' expected a flow model: {wanted}, or prediction_type=flow_prediction'
        )
    shift = config.get('flow_shift', 1.0)
    pipeline.scheduler = getattr(diffusers_module(), wanted)(shift=shift)
    return pipeline, [f'its {scheduler} was replaced by {wanted}(shift={shift}) for the comparison']


def _integrate_stock(pipeline: Any, latents: Tensor, **options: Any) -> list[Tensor]:
    """The latents after each step."""
    made = []

    def keep(pipeline, step, t, given):
        made.append(given['latents'].clone())
        return given

    pipeline(latents=latents, output_type='latent', callback_on_step_end=keep, **options)
    return made


def _differences(
    velocity: Callable[[Tensor, Tensor], Tensor], z: Tensor, times: Tensor, expected: list[Tensor]
) -> list[float]:
    found: list[float] = []

    def compare(step: int, x_t: Tensor, t: Tensor) -> None:
        found.append(float((x_t - expected[step]).abs().max() / expected[step].std()))

    euler(velocity, z, times, compare)
    return found


def _explain(
    check: TeacherCheck,
    family: DiffusersFamily,
    network: nn.Module,
    velocity: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    expected: list[Tensor],
    conditions: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> list[str]:
    """What differs: times, then the first step's velocity."""
    notes = []
    apart = (check.times - check.stock_times).abs()
    times = check.stock_times.to(z.device)
    if apart.max() > SAME_TIME:
        worst = int(apart.argmax())
        notes.append(
            f'times: step {worst + 1} is at {check.times[worst]:.4f} here and at'
            f' {check.stock_times[worst]:.4f} in the pipeline; its scheduler_config.json has'
            ' another shift or grid than the published one: give samplings its shift, and train'
            ' with densities of t that fit it'
        )
        if max(_differences(velocity, z, times, expected)) <= check.tolerance:
            return [*notes, "with the pipeline's own times all steps are equal"]
    t = times[0].expand(len(z))
    theirs = (expected[0] - z) / (times[1] - times[0])
    of_cond, of_null = (network(z, t, **given).float() for given in conditions)
    basis = torch.stack([of_cond.flatten(), of_null.flatten()], dim=1).double()
    wanted = theirs.flatten().double()
    solution = torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0]
    left = float((basis @ solution - wanted).norm() / wanted.norm())
    a, b = solution.tolist()
    if left > 0.01:
        notes.append(
            f'velocity: {left:.0%} of the first one is no mixture of our velocities with and'
            ' without a prompt: the network is given another time, other prompts or other latents'
        )
    elif a + b < 0:
        notes.append(
            'sign: the pipeline goes against our velocity; its model predicts x_0 - eps, or its'
            ' scheduler steps the other way'
        )
    elif torch.allclose(theirs, velocity(z, t).float(), rtol=1e-3, atol=1e-3):
        notes.append('velocity: the first one is ours; they part where times or steps differ')
    else:
        notes.append(
            f'guidance: the pipeline mixes {a:.2f} of the velocity with a prompt and {b:.2f} of'
            ' that without; give --guidance that scale, or look for its own rescaling'
        )
    return notes
