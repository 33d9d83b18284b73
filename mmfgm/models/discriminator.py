# Copyright (c) mmfgm authors.
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 1)]
        for _ in range(num_layers):
            layers += [
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
                nn.GroupNorm(min(32, channels), channels),
            ]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits in the features' dtype; positive means real."""
        return self.layers(features.to(self.layers[0].weight.dtype)).to(features.dtype)


@dataclass
class GAN:
    """Settings of the adversarial terms of FGM (Appendix B.2), and how logits are made.

    Real and generated latents are noised to ``t`` of their own sampler, the online network gives
    the features of one layer, and the head judges them.

    Args:
        time_sampler (dict): Density of ``t``; the paper samples low noise here.
        feature_layer (int): Layer of the online network, counted from 1. Defaults to 2.
        generator_weight (float): Weight in the generator's loss. Defaults to 1e-2.
        discriminator_weight (float): Weight beside the online network's flow-matching loss.
            Defaults to 5e-2.
        train_features (bool): Whether the discriminator's loss also trains the online network, as
            in DMD2 (Yin et al., 2024), on which the paper draws: the paper weights that loss, and a
            weight means nothing to a head that Adam trains alone. Defaults to True.
        head (dict): Config of the head. Defaults to ``dict(type='ConvDiscriminator')``.
    """

    time_sampler: dict
    feature_layer: int = 2
    generator_weight: float = 1e-2
    discriminator_weight: float = 5e-2
    train_features: bool = True
    head: dict = field(default_factory=lambda: dict(type='ConvDiscriminator'))

    def __post_init__(self):
        self.sampler = TASK_UTILS.build(self.time_sampler)

    def build_head(self, network: nn.Module) -> nn.Module:
        """The head for the features of ``network``, which is asked whether it has the layer."""
        network.check_feature_layer(self.feature_layer)
        return MODELS.build(self.head, default_args=dict(in_channels=network.feature_dim))

    def logits(
        self,
        online: nn.Module,
        head: nn.Module,
        x_0: Tensor,
        cond: dict[str, Any],
        train_features: bool,
    ) -> Tensor:
        """Noise ``x_0 (N, *event)``, take the online network's features, and judge them."""
        path = LinearPath.sample(x_0, self.sampler(len(x_0), x_0.device))
        with torch.set_grad_enabled(train_features):
            features = online(path.x_t, path.t, **cond, feature_layer=self.feature_layer)
        return head(features)
