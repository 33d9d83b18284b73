# Copyright (c) mmfgm authors.
import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.flow import ClassifierFreeGuidance, LinearPath, PathSample
from mmfgm.registry import MODELS, TASK_UTILS

from .base import FlowModel, Phase
from .discriminator import GAN
from .fp8 import to_fp8
from .generators import StepBiases
from .lora import LoRA, copy_network
from .losses import discriminator_loss, generator_gan_loss
from .sampling import Conditions
from .weights import load_network

EMA = dict(generator_ema=0.999)


def build_generator(cfg: dict | None, network: nn.Module) -> nn.Module:
    """The map from noise to samples that ``model.generator`` of a config puts around a network."""
    return MODELS.build({'type': 'OneStepGenerator', **(cfg or {}), 'network': network})


def max_nfe(cfg: dict | None) -> int:
    """Network calls that a sample of such a generator takes at most."""
    return getattr(build_generator(cfg, nn.Identity()), 'max_nfe', 1)


@MODELS.register_module()
class FGM(FlowModel):
    """Flow Generator Matching (Algorithm 1): distil a flow-matching teacher into a generator
    of one step or a few.

    Four networks of one architecture: ``teacher`` u (frozen), ``online`` v_psi (learns the flow of
    what the generator makes now), ``generator`` g_theta, and its averages. All start from the
    teacher.

    Batches are ``dict(idx, cond=dict(...))``: FGM needs conditions, but no data. With ``gan`` they
    carry real samples too, ``real=dict(x_0, cond=dict(...))``, and the online phase trains a
    ``discriminator`` beside the online network.

    Args:
        network (dict): Config of the velocity network, the same as the teacher's.
        teacher (dict): ``dict(checkpoint=..., prefix='network_ema', weights_only=True)``, see
            :func:`mmfgm.models.load_network`; ``checkpoint=None`` keeps the weights that the
            network's own config loads or initialises. ``fp8=True`` lets the teacher multiply in 8
            bits, see :func:`~mmfgm.models.fp8.to_fp8`.
        fm_time_sampler (dict): Density of ``t`` in the online phase's flow-matching loss.
        fgm_time_sampler (dict): Density of ``t`` in the generator phase's FGM loss.
        generator (dict): Config of the map from noise to samples around the network. Its ``type``
            defaults to :class:`OneStepGenerator`, which takes ``t_star, c_skip, c_out, c_in``;
            :class:`FewStepGenerator` takes ``times``.
        loss (dict): Config of the generator's loss, called as ``loss(u, v, path)``. Defaults to
            ``dict(type='FGMLoss')``; :mod:`mmfgm.models.losses` has the methods beside it.
        loss_scale (float): Multiplies the generator's whole loss, its GAN term included; the paper
            uses 100 for SD3. Defaults to 1.
        online_loss (dict): Config of the online network's loss, called as ``loss(None, v, path)``.
            Defaults to ``dict(type='FlowMatchingLoss')``.
        guidance (dict, optional): Classifier-free guidance of the teacher in the generator's loss,
            for example ``dict(type='ClassifierFreeGuidance', scale=4., null=dict(type='NullLabel',
            label=10))``.
        online_guidance (dict, optional): The same of the online network, which is then also
            trained on its guided velocity: long and short guidance (Zhou et al., 2024).
        step_aware (bool): Tell the online network which step of a generator of several made each
            sample, so that it learns the flow of each, and each is pulled to the teacher's. It
            learns that of their mixture otherwise, which can be right where no step is. Defaults to
            True; with one step there is nothing to tell.
        gan (dict, optional): Arguments of :class:`~mmfgm.models.discriminator.GAN`.
        lora (dict, optional): Arguments of :class:`~mmfgm.models.lora.LoRA`. The online network and
            the generator then share the teacher's weights and train only adapters; checkpoints hold
            these alone.
        data_preprocessor (dict, optional): For example ``dict(type='ImagePreprocessor')`` for real
            uint8 images.
        decoder (dict, optional): Config that turns samples into images, for example
            ``dict(type='LatentDecoder')``.
        ema (dict[str, float]): Average name to decay. Defaults to ``dict(generator_ema=0.999)``.
        networks (Collection[str], optional): Names of those to make, see :meth:`FlowModel.build`.
    """

    phases = dict(
        online=Phase(trains=('online',)),
        generator=Phase(trains=('generator',), freezes=('online',), differentiable=True),
    )
    ema_source = 'generator'
    pretrained = ('teacher',)

    def __init__(
        self,
        network: dict,
        teacher: dict,
        fm_time_sampler: dict,
        fgm_time_sampler: dict,
        generator: dict | None = None,
        loss: dict | None = None,
        loss_scale: float = 1.0,
        online_loss: dict | None = None,
        guidance: dict | None = None,
        online_guidance: dict | None = None,
        step_aware: bool = True,
        gan: dict | None = None,
        lora: dict | None = None,
        data_preprocessor: dict | None = None,
        decoder: dict | None = None,
        ema: dict[str, float] | None = None,
        networks: Collection[str] | None = None,
    ):
        super().__init__(data_preprocessor, decoder)
        if 'checkpoint' not in teacher:
            raise UsageError(
                'model.teacher must name a checkpoint (None keeps the network as its own config'
                f' makes it), but is {dict(teacher)}'
            )
        self.gan = GAN(**gan) if gan else None
        if gan:
            self.phases = dict(
                online=Phase(trains=('online', 'discriminator')),
                generator=Phase(
                    trains=('generator',), freezes=('online', 'discriminator'), differentiable=True
                ),
            )
        ema = dict(EMA if ema is None else ema)
        self._check_ema(ema)
        wanted = self._choose(self.network_names(dict(gan=gan, ema=ema)), networks)
        self._make_networks(wanted, network, teacher, generator, LoRA(**lora) if lora else None)
        self.ema_decays = {name: decay for name, decay in ema.items() if name in wanted}
        # the generator itself may be wrapped
        drawing = build_generator(generator, nn.Identity())
        steps = getattr(drawing, 'max_nfe', 1)
        self.generators = dict.fromkeys(('generator', *ema), steps)
        self._draw_steps = drawing.draw_steps if step_aware and steps > 1 else None
        if self._draw_steps is not None and 'online' in wanted:
            StepBiases(self.online, steps)
        self.loss_fgm = MODELS.build(loss or dict(type='FGMLoss'))
        self.loss_online = MODELS.build(online_loss or dict(type='FlowMatchingLoss'))
        self.fm_time_sampler = TASK_UTILS.build(fm_time_sampler)
        self.fgm_time_sampler = TASK_UTILS.build(fgm_time_sampler)
        self.loss_scale = loss_scale
        self._check_density()
        self.guidance = TASK_UTILS.build(guidance) if guidance else None
        self.online_guidance = TASK_UTILS.build(online_guidance) if online_guidance else None
        guided = self.guidance or self.online_guidance
        self.null = guided.null if guided else None

    @classmethod
    def network_names(cls, cfg: dict) -> list[str]:
        averages = EMA if cfg.get('ema') is None else cfg['ema']
        trained = ['online', 'generator', *(['discriminator'] if cfg.get('gan') else [])]
        return ['teacher', *trained, *averages]

    def _check_density(self) -> None:
        order = getattr(self.loss_fgm, 'order_at_0', 0.0)
        low = getattr(self.fgm_time_sampler, 'low', 0.0)
        if order < 0 and low <= 0:
            raise UsageError(
                f'{type(self.loss_fgm).__name__} with these weights goes like t^{order:g} and is'
                f' not defined at t = 0, but model.fgm_time_sampler ({self.fgm_time_sampler}) has'
                ' no lower end; set its low, for example low=0.02, or a weight with a higher power'
                ' of t'
            )

    def _make_networks(
        self,
        wanted: list[str],
        network: dict,
        teacher: dict,
        generator: dict | None,
        lora: LoRA | None,
    ) -> None:
        """Make the ``wanted`` networks, all as the teacher stands; others cost no memory."""
        base = MODELS.build(network)
        self._describe(base)
        teacher = dict(teacher)
        fp8 = teacher.pop('fp8', False)
        if fp8 and lora is not None:
            raise UsageError(
                'model.teacher.fp8 expects a teacher of its own, found model.lora, under which all'
                ' networks share its weights; leave one of them out'
            )
        if teacher['checkpoint'] is not None and ('teacher' in wanted or lora is not None):
            load_network(base, **teacher)
        # without a teacher to keep, the first network that is made needs no copy
        spare = [] if 'teacher' in wanted or lora is not None else [base]

        def copied() -> nn.Module:
            if lora is not None:
                return lora.adapted(base)
            return spare.pop() if spare else copy.deepcopy(base)

        for name in wanted:
            if name == 'teacher':
                self.teacher = base
            elif name == 'online':
                self.online = copied()
            elif name == 'discriminator':
                self.discriminator = self.gan.build_head(base)
            elif name != 'generator' and 'generator' in wanted:
                self.add_module(name, copy_network(self.generator).requires_grad_(False))
            else:
                made = build_generator(generator, copied())
                self.add_module(name, made if name == 'generator' else made.requires_grad_(False))
        if 'teacher' in wanted:
            self.teacher.requires_grad_(False)
            if fp8:
                self.teacher = to_fp8(self.teacher)

    def prepare(self, batch: dict[str, Any], differentiable: bool) -> dict[str, Any]:
        """Add ``x_0 = g(z)``, fresh noise ``z ~ N(0, I)``; with its graph only if
        ``differentiable``.

        Raises:
            UsageError: If a loss needs real samples and the batch has none.
        """
        samples = super().prepare(batch, differentiable)
        if self._needs_real and 'real' not in samples:
            who = 'discriminator' if self.gan else type(self.loss_online).__name__
            raise UsageError(
                f'the {who} learns from real samples too, but the batches of train_dataloader hold'
                f" {sorted(samples)}; use dataset=dict(type='WithReal', conditions=..., real=...)"
            )
        device = next(self.generator.parameters()).device
        z = torch.randn(len(samples['idx']), *self.event_shape, device=device)
        with torch.set_grad_enabled(differentiable):
            return {**samples, **self.generate(z, samples['cond'])}

    def generate(self, z: Tensor, cond: Conditions) -> dict[str, Tensor]:
        """``x_0 = g(z)`` as training takes it, and which ``step`` made each sample where the online
        network is told."""
        if self._draw_steps is None:
            return dict(x_0=self.generator(z, **cond))
        steps = self._draw_steps(len(z))
        x_0 = self.generator(z, steps=steps, **cond)
        return dict(x_0=x_0, step=torch.tensor(steps, device=z.device))

    @property
    def _needs_real(self) -> bool:
        return self.gan is not None or self._online_needs_real

    @property
    def _online_needs_real(self) -> bool:
        return getattr(self.loss_online, 'needs_real', False)

    def loss(self, phase: str, samples: dict[str, Any]) -> dict[str, Tensor]:
        x_0, cond, step = samples['x_0'], samples['cond'], samples.get('step')
        if phase == 'generator':
            return self.generator_loss(x_0, cond, step)
        losses = self.online_loss(x_0, cond, samples.get('real'), step)
        if self.gan is not None:
            losses.update(self.discriminator_loss(x_0, cond, samples['real']))
        return losses

    def _velocity(
        self,
        network: Callable[..., Tensor],
        guidance: ClassifierFreeGuidance | None,
        x_t: Tensor,
        t: Tensor,
        cond: Conditions,
    ) -> Tensor:
        if guidance is None:
            return network(x_t, t, **cond)
        return guidance(network, x_t, t, cond)

    def _told(self, step: Tensor | None) -> Callable[..., Tensor]:
        """The online network, told the ``step (N,)`` of its samples; guidance calls it with them
        twice."""
        if step is None:
            return self.online

        def told(x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            return self.online(x_t, t, step=step.repeat(len(x_t) // len(step)), **cond)

        return told

    def online_loss(
        self,
        x_0: Tensor,
        cond: Conditions,
        real: dict[str, Any] | None = None,
        step: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``L_FM(psi)`` of Algorithm 1: flow matching on what the generator makes now, each
        ``step (N,)`` of it for itself; on ``real`` samples too, in the same network call, if the
        loss says so."""
        x_0_sg = x_0.detach()
        path = LinearPath.sample(x_0_sg, self.fm_time_sampler(len(x_0), x_0.device))
        if not self._online_needs_real:
            v = self._velocity(self._told(step), self.online_guidance, path.x_t, path.t, cond)
            return self.loss_online(None, v, path)
        n = len(x_0)
        if step is not None:
            # real samples are of every step's data
            drawn = self._draw_steps(len(real['x_0']))
            step = torch.cat([step, torch.tensor(drawn, device=step.device)])
        path_real = LinearPath.sample(
            real['x_0'], self.fm_time_sampler(len(real['x_0']), x_0.device)
        )
        both = {name: torch.cat([cond[name], real['cond'][name]]) for name in cond}
        x_t, t = torch.cat([path.x_t, path_real.x_t]), torch.cat([path.t, path_real.t])
        v = self._velocity(self._told(step), self.online_guidance, x_t, t, both)
        return self.loss_online(None, v[:n], path, v[n:], path_real)

    def discriminator_loss(
        self, x_0: Tensor, cond: Conditions, real: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The head on noisy generated and real samples, both in one call of the network that gives
        the features (B.2)."""
        x_0_sg = x_0.detach()
        real_x_0 = real['x_0']
        both = {name: torch.cat([real['cond'][name], cond[name]]) for name in cond}
        logits = self.gan.logits(
            self.networks[self.gan.features],
            self.discriminator,
            torch.cat([real_x_0, x_0_sg]),
            both,
            self.gan.train_features,
        )
        real_logits, fake_logits = logits.split([len(real_x_0), len(x_0)])
        accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
        loss = discriminator_loss(real_logits, fake_logits).mean()
        return dict(loss_d=self.gan.discriminator_weight * loss, d_accuracy=accuracy)

    def generator_loss(
        self, x_0: Tensor, cond: Conditions, step: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``L_FGM(theta) = L_1 + L_2`` (Eq. 4.10 to 4.12), or the loss of another method, psi
        frozen by the loop; with a GAN, its term beside it."""
        losses: dict[str, Tensor] = {}
        path = self._noised(x_0, losses)
        with torch.set_grad_enabled(self._through and torch.is_grad_enabled()):
            u = self._velocity(self.teacher, self.guidance, path.x_t, path.t, cond)
            v = self._velocity(self._told(step), self.online_guidance, path.x_t, path.t, cond)
        losses.update(self.loss_fgm(u, v, path))
        return self._with_gan(losses, x_0, cond)

    def check_joint(self) -> None:
        if self.fm_time_sampler != self.fgm_time_sampler or self._online_needs_real:
            raise UsageError(
                'train_cfg.share_velocity evaluates the online network once for both losses, so it'
                ' expects one density of t and no loss on real samples, found'
                f' {self.fm_time_sampler} and {self.fgm_time_sampler} with'
                f' {type(self.loss_online).__name__}; make model.fm_time_sampler and'
                ' fgm_time_sampler equal, or set share_velocity=False'
            )

    def joint_loss(self, samples: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """The losses of both phases from one forward of the online network, at the same ``x_t``.
        Their gradients are to be taken with respect to what each phase trains, nothing else."""
        x_0, cond, step = samples['x_0'], samples['cond'], samples.get('step')
        losses: dict[str, Tensor] = {}
        path = self._noised(x_0, losses)
        v = self._velocity(self._told(step), self.online_guidance, path.x_t, path.t, cond)
        with torch.set_grad_enabled(self._through):
            u = self._velocity(self.teacher, self.guidance, path.x_t, path.t, cond)
        losses.update(self.loss_fgm(u, v if self._through else v.detach(), path))
        online = self.loss_online(None, v, path)
        if self.gan is not None:
            online.update(self.discriminator_loss(x_0, cond, samples['real']))
        return dict(generator=self._with_gan(losses, x_0, cond), online=online)

    @property
    def _through(self) -> bool:
        """Whether the generator's gradient passes through teacher and online network."""
        return getattr(self.loss_fgm, 'through_networks', True)

    def _noised(self, x_0: Tensor, values: dict[str, Tensor]) -> PathSample:
        x_0_fgm = _measured(x_0, 'fgm', values)
        return LinearPath.sample(x_0_fgm, self.fgm_time_sampler(len(x_0), x_0.device))

    def _with_gan(
        self, losses: dict[str, Tensor], x_0: Tensor, cond: Conditions
    ) -> dict[str, Tensor]:
        """The generator's losses with its term of the GAN, scaled."""
        if self.gan is not None and self.iteration >= self.gan.start:
            fake = self.gan.logits(
                self.networks[self.gan.features],
                self.discriminator,
                _measured(x_0, 'gan', losses),
                cond,
                train_features=True,
            )
            losses['loss_g'] = self.gan.generator_weight * generator_gan_loss(fake).mean()
        return {k: self.loss_scale * v if 'loss' in k else v for k, v in losses.items()}


def _measured(x_0: Tensor, term: str, values: dict[str, Tensor]) -> Tensor:
    """A branch of ``x_0`` for one term of the loss; the norm of the gradient that comes back
    through it stands in ``values['grad_x_0_TERM']`` after the backward pass."""
    if not x_0.requires_grad:
        return x_0
    norm = values[f'grad_x_0_{term}'] = x_0.new_zeros(())
    branch = x_0.view_as(x_0)

    def keep(grad: Tensor) -> None:
        norm.copy_(grad.norm())

    branch.register_hook(keep)
    return branch
