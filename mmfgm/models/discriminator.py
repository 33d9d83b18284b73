# Copyright (c) mmfgm authors.
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.flow import LinearPath
from mmfgm.registry import MODELS, TASK_UTILS


@MODELS.register_module()
class ConvDiscriminator(nn.Module):
    """Lightweight convolutional head on a feature map (Appendix B.2): ``(N, D, h, w)`` to logits
    ``(N, 1, h', w')``.

    Args:
        in_channels (int): Channels D of the features; filled in from the network.
        channels (int): Width of the head. Defaults to 256.
        num_layers (int): Convolutions of stride 2 before the last one. Defaults to 2.
    """

    def __init__(self, in_channels: int, channels: int = 256, num_layers: int = 2):
        super().__init__()
        # at least four channels a group: on a 1 x 1 map, one alone would be normalised to 0
        groups = math.gcd(32, max(1, channels // 4))
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 1)]
        for _ in range(num_layers):
            layers += [
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
                nn.GroupNorm(groups, channels),
            ]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits in the features' dtype; positive means real."""
        return self.layers(features.to(self.layers[0].weight.dtype)).to(features.dtype)


class LayerHeads(nn.Module):
    """One head for each of several layers; their logits side by side, ``(N, logits)``.

    Args:
        heads (Iterable[nn.Module]): In the order of the layers.
    """

    def __init__(self, heads: Iterable[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of all layers."""
        logits = [head(feature).flatten(1) for head, feature in zip(self.heads, features)]
        return torch.cat(logits, dim=1)


@dataclass
class GAN:
    """Settings of the adversarial terms of FGM (Appendix B.2), and how logits are made.

    Real and generated latents are noised to ``t`` of their own sampler, the online network or the
    teacher gives the features of a layer or of several, and a head for each judges them.

    Args:
        time_sampler (dict): Density of ``t``; the paper samples low noise here.
        feature_layer (int | Sequence[int]): Layer of the network, counted from 1, or several.
            Defaults to 2.
        features (str): The network that gives them, ``'online'`` or ``'teacher'``. Defaults to
            ``'online'``, as in the paper.
        generator_weight (float): Weight in the generator's loss. Defaults to 1e-2.
        discriminator_weight (float): Weight beside the online network's flow-matching loss.
            Defaults to 5e-2.
        train_features (bool, optional): Whether the discriminator's loss also trains the online
            network, as in DMD2 (Yin et al., 2024), on which the paper draws: the paper weights that
            loss, and a weight means nothing to a head that Adam trains alone. Defaults to True for
            features of the online network; the teacher is never trained.
        start (int): First iteration whose generator loss has the adversarial term; the
            discriminator learns from the beginning, so that the generator meets a trained one.
            Defaults to 0.
        head (dict): Config of the head. Defaults to ``dict(type='ConvDiscriminator')``.

    Raises:
        UsageError: For another network, or a teacher that is to be trained.
    """

    time_sampler: dict
    feature_layer: int | Sequence[int] = 2
    features: str = 'online'
    generator_weight: float = 1e-2
    discriminator_weight: float = 5e-2
    train_features: bool | None = None
    start: int = 0
    head: dict = field(default_factory=lambda: dict(type='ConvDiscriminator'))

    def __post_init__(self):
        if self.features not in ('online', 'teacher'):
            raise UsageError(
                f'model.gan.features names the network that gives them, but is {self.features!r};'
                " use 'online' or 'teacher'"
            )
        if self.features == 'teacher' and self.train_features:
            raise UsageError(
                "model.gan.train_features would train the teacher (features='teacher'); remove it,"
                " or set features='online'"
            )
        if self.train_features is None:
            self.train_features = self.features == 'online'
        if not isinstance(self.feature_layer, int):
            self.feature_layer = tuple(self.feature_layer)
        self.sampler = TASK_UTILS.build(self.time_sampler)

    def build_head(self, network: nn.Module) -> nn.Module:
        """The head, or heads, for the features of ``network``, which is asked whether it has the
        layers."""
        several = not isinstance(self.feature_layer, int)
        layers = self.feature_layer if several else (self.feature_layer,)
        for layer in layers:
            network.check_feature_layer(layer)
        width = dict(in_channels=network.feature_dim)
        heads = [MODELS.build(self.head, default_args=width) for _ in layers]
        return LayerHeads(heads) if several else heads[0]

    def logits(
        self,
        network: nn.Module,
        head: nn.Module,
        x_0: Tensor,
        cond: dict[str, Any],
        train_features: bool,
    ) -> Tensor:
        """Noise ``x_0 (N, *event)``, take the network's features, and judge them."""
        path = LinearPath.sample(x_0, self.sampler(len(x_0), x_0.device))
        with torch.set_grad_enabled(train_features):
            features = network(path.x_t, path.t, **cond, feature_layer=self.feature_layer)
        return head(features)
