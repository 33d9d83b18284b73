# Copyright (c) mmfgm authors.
"""Train the classifier whose features samples are measured by."""

import inspect
import json
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.device import get_device
from mmengine.logging import MMLogger
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from mmfgm.datasets import collate
from mmfgm.errors import UsageError
from mmfgm.evaluation import ConvClassifier
from mmfgm.files import write_file
from mmfgm.models import from_uint8
from mmfgm.registry import DATASETS

# of a dataset without test images, every tenth is held out
HOLD_OUT = 10


def train_classifier(
    dataset: dict, out: str, epochs: int = 4, batch_size: int = 128, seed: int = 0
) -> float:
    """Train a :class:`~mmfgm.evaluation.ConvClassifier` and write it with what it is.

    The accuracy is that on the test images, where the dataset takes ``train=False``, or else on
    every tenth image, which is then not trained on.

    Args:
        dataset (dict): Config of a dataset of images ``x_0 (C, H, W)`` with ``labels``.
        out (str): The ``.safetensors`` file.
        epochs (int): Passes over the training images.
        batch_size (int): Of Adam's steps; the learning rate rises to 2e-3 and falls to 0.
        seed (int): Of the weights and the order.

    Returns:
        float: The accuracy.

    Raises:
        UsageError: If the dataset has no labels, or its items are no images.
    """
    images, labels, test_images, test_labels = _split(dataset)
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    device = get_device()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ConvClassifier(images.shape[1:], num_classes).to(device)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        steps = epochs * -(-len(images) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for epoch in range(epochs):
            for rows in torch.randperm(len(images)).split(batch_size):
                _, logits = network(from_uint8(images[rows]).to(device))
                loss = F.cross_entropy(logits, labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            accuracy = _accuracy(network, test_images, test_labels)
            MMLogger.get_current_instance().info(
                f'Epoch {epoch + 1}/{epochs}: accuracy {accuracy:.4f} on {len(test_labels)} images'
            )
    about = dict(
        event_shape=list(images.shape[1:]),
        num_classes=num_classes,
        dim=network.head.in_features,
        accuracy=round(accuracy, 4),
        num_test=len(test_labels),
        dataset=json.loads(json.dumps(dataset)),
    )
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    write_file(out, save(state, dict(classifier=json.dumps(about))))
    return accuracy


@torch.no_grad()
def _accuracy(network: ConvClassifier, images: Tensor, labels: Tensor) -> float:
    right = 0
    device = next(network.parameters()).device
    for rows in torch.arange(len(images)).split(500):
        _, logits = network(from_uint8(images[rows]).to(device))
        right += int((logits.argmax(1).cpu() == labels[rows]).sum())
    return right / len(images)


def _split(cfg: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on and to test on."""
    images, labels = _read(cfg)
    if 'train' in inspect.signature(DATASETS.get(cfg['type'])).parameters:
        return images, labels, *_read({**cfg, 'train': False})
    if len(images) < HOLD_OUT:
        raise UsageError(
            f'{cfg["type"]} has {len(images)} images, too few to hold out every tenth; use more'
        )
    held = torch.arange(len(images)) % HOLD_OUT == 0
    return images[~held], labels[~held], images[held], labels[held]


def _read(cfg: dict) -> tuple[Tensor, Tensor]:
    dataset: Any = DATASETS.build(cfg)
    batches = list(DataLoader(dataset, 1000, collate_fn=collate))
    if 'labels' not in batches[0]['cond'] or batches[0].get('x_0', torch.empty(0)).ndim != 4:
        raise UsageError(
            f'a classifier needs images (C, H, W) with labels, which {cfg["type"]} does not give;'
            ' set its labels=True, or name a config of another dataset'
        )
    return (
        torch.cat([batch['x_0'] for batch in batches]),
        torch.cat([batch['cond']['labels'] for batch in batches]),
    )
