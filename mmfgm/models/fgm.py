# Copyright (c) mmfgm authors.
import copy
from typing import Any

import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.flow import LinearPath
from mmfgm.registry import MODELS, TASK_UTILS

from .base import FlowModel, Phase
from .discriminator import GAN
from .generator import OneStepGenerator
from .lora import LoRA
from .losses import discriminator_loss, flow_matching_loss, generator_gan_loss
from .weights import fingerprint, load_network


@MODELS.register_module()
class FGM(FlowModel):
    """Flow Generator Matching (Algorithm 1): distil a flow-matching teacher into a one-step
    generator.

    Four networks of one architecture: ``teacher`` u (frozen), ``online`` v_psi (learns the flow of
        what
    the generator makes now), ``generator`` g_theta, and its averages. All start from the teacher.

    Batches are ``dict(idx, [labels, ...])``: FGM needs conditions, but no data. With ``gan`` they
    carry real samples too, ``real_x_0`` and their conditions (``real_labels``, ...), and the online
    phase trains a ``discriminator`` beside the online network.

    Args:
        network (dict): Config of the velocity network, the same as the teacher's.
        teacher (dict): ``dict(checkpoint=..., prefix='network_ema', weights_only=True)``, see
            :func:`mmfgm.models.load_network`; ``checkpoint=None`` keeps the weights that the
            network's own config loads or initialises.
        fm_time_sampler (dict): Density of ``t`` in the online phase's flow-matching loss.
        fgm_time_sampler (dict): Density of ``t`` in the generator phase's FGM loss.
        generator (dict): ``t_star, c_skip, c_out, c_in`` of :class:`OneStepGenerator`.
        loss (dict): Config of the generator's loss. Defaults to ``dict(type='FGMLoss')``.
        guidance (dict, optional): Classifier-free guidance of the teacher in the FGM loss, for
            example ``dict(type='ClassifierFreeGuidance', scale=4., null=dict(type='NullLabel',
            label=10))``.
        gan (dict, optional): Arguments of :class:`~mmfgm.models.discriminator.GAN`.
        lora (dict, optional): Arguments of :class:`~mmfgm.models.lora.LoRA`. The online network and
            the generator then share the teacher's weights and train only adapters; checkpoints hold
            these alone.
        data_preprocessor (dict, optional): For example ``dict(type='ImagePreprocessor')`` for real
            uint8 images.
        decoder (dict, optional): Config that turns samples into images, for example
            ``dict(type='LatentDecoder')``.
        ema (dict[str, float]): Average name to decay. Defaults to ``dict(generator_ema=0.999)``.
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
        guidance: dict | None = None,
        gan: dict | None = None,
        lora: dict | None = None,
        data_preprocessor: dict | None = None,
        decoder: dict | None = None,
        ema: dict[str, float] | None = None,
    ):
        super().__init__(data_preprocessor, decoder)
        self.teacher = MODELS.build(network)
        if 'checkpoint' not in teacher:
            raise UsageError(
                'model.teacher must name a checkpoint (None keeps the network as its own config'
                f' makes it), but is {dict(teacher)}'
            )
        if teacher['checkpoint'] is not None:
            load_network(self.teacher, **teacher)
        self.fingerprints = dict(teacher=fingerprint(self.teacher))
        self._describe(self.teacher)
        copied = copy.deepcopy if lora is None else LoRA(**lora).adapted
        self.online = copied(self.teacher)
        self.generator = OneStepGenerator(copied(self.teacher), **(generator or {}))
        self.teacher.requires_grad_(False)
        self.loss_fgm = MODELS.build(loss or dict(type='FGMLoss'))
        self.fm_time_sampler = TASK_UTILS.build(fm_time_sampler)
        self.fgm_time_sampler = TASK_UTILS.build(fgm_time_sampler)
        self.guidance = TASK_UTILS.build(guidance) if guidance else None
        self.null = self.guidance.null if guidance else None
        self.gan = GAN(**gan) if gan else None
        if gan:
            self.discriminator = self.gan.build_head(self.online)
            self.phases = dict(
                online=Phase(trains=('online', 'discriminator')),
                generator=Phase(
                    trains=('generator',), freezes=('online', 'discriminator'), differentiable=True
                ),
            )
        self._init_ema(dict(generator_ema=0.999) if ema is None else ema)
        self.one_step = ('generator', *self.ema_decays)

    def prepare(self, batch: dict[str, Any], differentiable: bool) -> dict[str, Any]:
        """Add ``x_0 = g(z)``, fresh noise ``z ~ N(0, I)``; with its graph only if
        ``differentiable``."""
        samples = super().prepare(batch, differentiable)
        device = next(self.generator.parameters()).device
        z = torch.randn(len(samples['idx']), *self.event_shape, device=device)
        with torch.set_grad_enabled(differentiable):
            return {**samples, 'x_0': self.generator(z, **self.conditions(samples))}

    def loss(self, phase: str, samples: dict[str, Any]) -> dict[str, Tensor]:
        cond = self.conditions(samples)
        if phase == 'generator':
            return self.generator_loss(samples['x_0'], cond)
        losses = self.online_loss(samples['x_0'], cond)
        if self.gan is not None:
            losses.update(
                self.discriminator_loss(
                    samples['x_0'], cond, samples['real_x_0'], self.conditions(samples, 'real_')
                )
            )
        return losses

    def online_loss(self, x_0: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """``L_FM(psi)`` of Algorithm 1: flow matching on what the generator makes now."""
        x_0_sg = x_0.detach()
        path = LinearPath.sample(x_0_sg, self.fm_time_sampler(len(x_0), x_0.device))
        v = self.online(path.x_t, path.t, **cond)
        return dict(loss_fm=flow_matching_loss(v, path.velocity).mean())

    def discriminator_loss(
        self, x_0: Tensor, cond: dict[str, Tensor], real_x_0: Tensor, real_cond: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The head on noisy generated and real samples, both in one call of the online network
        (B.2)."""
        x_0_sg = x_0.detach()
        both = {name: torch.cat([real_cond[name], cond[name]]) for name in cond}
        logits = self.gan.logits(
            self.online,
            self.discriminator,
            torch.cat([real_x_0, x_0_sg]),
            both,
            self.gan.train_features,
        )
        real, fake = logits.split([len(real_x_0), len(x_0)])
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return dict(
            loss_d=self.gan.discriminator_weight * discriminator_loss(real, fake).mean(),
            d_accuracy=accuracy,
        )

    def generator_loss(self, x_0: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """``L_FGM(theta) = L_1 + L_2`` (Eq. 4.10 to 4.12), psi frozen by the loop; with a GAN, its
        term beside it."""
        path = LinearPath.sample(x_0, self.fgm_time_sampler(len(x_0), x_0.device))
        if self.guidance is None:
            u = self.teacher(path.x_t, path.t, **cond)
        else:
            u = self.guidance(self.teacher, path.x_t, path.t, cond)
        v = self.online(path.x_t, path.t, **cond)
        losses = self.loss_fgm(u, v, path.velocity)
        if self.gan is not None:
            fake = self.gan.logits(self.online, self.discriminator, x_0, cond, train_features=True)
            losses['loss_g'] = self.gan.generator_weight * generator_gan_loss(fake).mean()
        return losses
