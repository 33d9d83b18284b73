# Copyright (c) mmfgm authors.
"""What a training gets to see, as a picture."""

from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor

from mmfgm.datasets import collate, item_seed
from mmfgm.errors import UsageError
from mmfgm.evaluation import draw_captioned
from mmfgm.models import Sampling
from mmfgm.registry import TASK_UTILS

from .config import building
from .testing import build_for_sampling

# a picture of more is read by nobody
MOST = 400


def browse(cfg: Config, num: int = 16, weights: str | None = None) -> np.ndarray:
    """Draw the first batch that the training's loader yields, after all transforms.

    Each item has its caption or label below it; cached latents are decoded where the config has a
    decoder. With weights, what the first average of the generator makes for the same items stands
    beside the real ones.

    Args:
        cfg (Config): Of a training; it is changed.
        num (int): Items, of which the loader's sampler says which. Defaults to 16.
        weights (str, optional): A checkpoint or work dir of the config.

    Returns:
        np.ndarray: RGB, ``(H, W, 3)`` uint8.

    Raises:
        UsageError: If the config has no loader, its items are no pictures, or there are neither
            real ones nor weights.
    """
    if not 1 <= num <= MOST:
        raise UsageError(f'--num must be in [1, {MOST}], but is {num}')
    if not cfg.get('train_dataloader'):
        raise UsageError('the config has no train_dataloader; name the config of a training')
    init_default_scope('mmfgm')
    loader = dict(cfg.train_dataloader, num_workers=0, batch_size=num, drop_last=False)
    loader.setdefault('collate_fn', dict(type=collate))
    # of worker processes, of which there are none
    for name in ('persistent_workers', 'prefetch_factor'):
        loader.pop(name, None)
    seed = cfg.get('randomness', {}).get('seed', 0)
    loader = building(lambda: Runner.build_dataloader(loader, seed=seed))
    batch: dict[str, Any] = next(iter(loader))
    dataset, indices = loader.dataset, batch['idx'].tolist()
    asked = [dataset.caption(index) for index in indices]
    panels: dict[str, tuple[Tensor, list[str]]] = {}
    real = batch.get('real', batch)
    if 'x_0' in real:
        decoder = cfg.model.get('decoder') if real['x_0'].shape[1:2] not in ((1,), (3,)) else None
        images = (
            building(lambda: TASK_UTILS.build(decoder))(real['x_0']) if decoder else real['x_0']
        )
        own = [dataset.real_caption(index) for index in indices] if 'real' in batch else asked
        panels['real'] = (images, own)
    if weights is not None:
        batch['seed'] = item_seed(batch['idx'])
        averages = list(cfg.model.get('ema') or {}) or ['generator']
        model = build_for_sampling(cfg, averages[:1], weights).model
        sampling = Sampling(averages[0], model.generators.get(averages[0], 1))
        model.check(sampling)
        panels['generated'] = (model.sample(batch, sampling).cpu(), asked)
    if not panels:
        raise UsageError(
            f'{type(dataset).__name__} holds conditions to generate for and no pictures; name a'
            ' checkpoint too, whose generator then draws them'
        )
    for images, _ in panels.values():
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UsageError(
                f'samples of shape {tuple(images.shape[1:])} are not pictures of 1 or 3 channels;'
                ' of latents, give the config a model.decoder, which turns them into pictures'
            )
    return draw_captioned(panels)
