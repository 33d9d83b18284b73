# Copyright (c) mmfgm authors.
"""Velocity networks around a U-Net of the signature ``unet(x, noise_labels, labels=None)``."""

import torch
from torch import Tensor, nn

from mmfgm.flow import expand_t
from mmfgm.registry import MODELS


class _UNetFlow(nn.Module):
    """What the wrappers tell the model about their U-Net."""

    def __init__(self, unet: dict | nn.Module):
        super().__init__()
        self.unet = MODELS.build(unet) if isinstance(unet, dict) else unet
        self.event_shape = (
            self.unet.in_channels,
            self.unet.img_resolution,
            self.unet.img_resolution,
        )
        self.num_classes = self.unet.label_dim

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``."""
        return next(iter(self.unet.enc.values()))


@MODELS.register_module()
class UNetVelocity(_UNetFlow):
    """A U-Net that predicts the velocity itself: ``v = F(x_t, 1000 t)``; for training with Eq. 3.6.

    Args:
        unet (dict | nn.Module): For example ``dict(type='EDMUNet', ...)``.
    """

    # the sinusoidal features were made for noise labels of 0 to 1000 (Ho et al., 2020)
    time_scale = 1000

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Velocity at ``x_t (N, C, H, W)`` and ``t (N,)`` in [0, 1], for ``labels (N,)`` or
        none."""
        return self.unet(x_t, self.time_scale * t, labels).to(x_t.dtype)


@MODELS.register_module()
class EDMVelocity(_UNetFlow):
    """The flow of a denoiser in EDM's preconditioning (Karras et al., 2022, Table 1).

    With ``sigma = t / (1 - t)``, ``D(x_t / (1 - t), sigma)`` is ``E[x_0 | x_t]``, so
    ``v = (x_t - D) / t``. Put in, with ``r^2 = t^2 + sigma_data^2 (1 - t)^2``, everything that
    would divide by ``t`` or ``1 - t`` cancels::

        v = (t - sigma_data^2 (1 - t)) / r^2 x_t - sigma_data / r F(x_t / r, ln(sigma) / 4)

    which holds at both ends of time too, but for ``ln(sigma)``, kept to ``sigma_range``.

    Args:
        unet (dict | nn.Module): ``F``, for example ``dict(type='EDMUNet', ...)``.
        sigma_data (float): Standard deviation of the data that the denoiser was trained for.
        sigma_range (tuple[float, float]): Noise levels that ``F`` is told; a published network
            knows 0.002 to 80. Defaults to all that float32 tells apart in ``t``.
    """

    def __init__(
        self,
        unet: dict | nn.Module,
        sigma_data: float = 0.5,
        sigma_range: tuple[float, float] = (1e-8, 1e8),
    ):
        super().__init__(unet)
        self.sigma_data = sigma_data
        self.sigma_range = tuple(sigma_range)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Velocity at ``x_t (N, C, H, W)`` and ``t (N,)`` in [0, 1], for ``labels (N,)`` or
        none."""
        t = t.to(torch.promote_types(t.dtype, x_t.dtype))
        sigma = (t / (1 - t)).clamp(*self.sigma_range)  # 1 / 0 is inf, and clamped
        s = expand_t(t, x_t)
        variance = self.sigma_data**2
        r = (s.square() + variance * (1 - s).square()).sqrt()
        prediction = self.unet(x_t / r, sigma.log() / 4, labels)
        return (s - variance * (1 - s)) / r.square() * x_t - self.sigma_data / r * prediction
