# Copyright (c) mmfgm authors.
"""The non-saturating GAN loss (Goodfellow et al., 2014) on maps of logits, one value per sample."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``-log D(real) - log(1 - D(fake))`` with ``D = sigmoid(logits)``.

    Args:
        real (Tensor): Logits ``(N, ...)`` of noisy real data; their mean over everything but ``N``
            counts.
        fake (Tensor): Logits ``(N, ...)`` of noisy generated samples.

    Returns:
        Tensor: ``(N,)``.
    """
    return (F.softplus(-real) + F.softplus(fake)).flatten(1).mean(1)


def generator_gan_loss(fake: Tensor) -> Tensor:
    """``-log D(fake)``: ``(N, ...)`` logits to ``(N,)``."""
    return F.softplus(-fake).flatten(1).mean(1)
