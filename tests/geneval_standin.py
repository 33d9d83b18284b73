# Copyright (c) mmfgm authors.
"""A detector and a colour classifier that are exact functions of the image, and prompts of all
tasks for them."""

import json
import os
import signal

import numpy as np
import torch

from mmfgm.evaluation.geneval.judging.prompts import COLORS
from mmfgm.registry import TASK_UTILS

CLASSES = ('person', 'cat', 'dog', 'bench')
ROWS = [
    dict(tag='single_object', include=[{'class': 'cat', 'count': 1}], prompt='a photo of a cat'),
    dict(
        tag='two_object',
        include=[{'class': 'cat', 'count': 1}, {'class': 'dog', 'count': 1}],
        prompt='a photo of a cat and a dog',
    ),
    dict(
        tag='counting',
        include=[{'class': 'dog', 'count': 2}],
        exclude=[{'class': 'dog', 'count': 3}],
        prompt='a photo of two dogs',
    ),
    dict(
        tag='colors',
        include=[{'class': 'bench', 'count': 1, 'color': 'white'}],
        prompt='a photo of a white bench',
    ),
    dict(
        tag='position',
        include=[
            {'class': 'dog', 'count': 1},
            {'class': 'cat', 'count': 1, 'position': ['left of', 0]},
        ],
        prompt='a photo of a cat left of a dog',
    ),
    dict(
        tag='color_attr',
        include=[
            {'class': 'cat', 'count': 1, 'color': 'black'},
            {'class': 'person', 'count': 1, 'color': 'white'},
        ],
        prompt='a photo of a black cat and a white person',
    ),
]


def write_prompts(path, rows=ROWS):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


class Seen:
    def __init__(self, boxes, size):
        self.boxes, self.size = boxes, size

    def masks(self, name, rows):
        masks = np.zeros((len(rows), *self.size), bool)
        for mask, row in zip(masks, rows):
            x1, y1, x2, y2 = self.boxes[name][row, :4].astype(int)
            mask[y1:y2, x1:x2] = True
        return masks


@TASK_UTILS.register_module()
class StandInDetector:
    """Sees every class in each quarter of an image; scores are continuous in the quarters' mean
    colours."""

    label, comparable = 'stand-in, not comparable with published scores', False
    devices = []  # where instances were moved to

    def __init__(self, salt=0.0):
        self.salt, self.count = salt, 0

    def to(self, device):
        self.devices.append(str(device))
        return self

    def __call__(self, images):
        self.count += len(images)
        if self.count > float(os.environ.get('KILL_AFTER', 'inf')):  # images of this process
            os.kill(os.getpid(), signal.SIGKILL)
        return [self._see(image) for image in images]

    def _see(self, image):
        h, w = image.shape[:2]
        corners = [
            (0, 0, w // 2, h // 2),
            (w // 2, 0, w, h // 2),
            (0, h // 2, w // 2, h),
            (w // 2, h // 2, w, h),
        ]
        boxes = {}
        for k, name in enumerate(CLASSES):
            means = [image[y1:y2, x1:x2].mean((0, 1)) / 255 for x1, y1, x2, y2 in corners]
            scores = [
                0.5 + 0.5 * np.sin(9 * (k + 1) * mean @ [1, 2, 3] + 5 * q + self.salt)
                for q, mean in enumerate(means)
            ]
            boxes[name] = np.array(
                [[*corner, score] for corner, score in zip(corners, scores)], np.float32
            )
        return Seen(boxes, (h, w))


@TASK_UTILS.register_module()
class StandInColors:
    """White or black, whichever the masked pixels are closer to."""

    label = 'white or black'

    def to(self, device):
        return self

    def classify(self, requests):
        answers = []
        for image, boxes, masks, name in requests:
            assert (
                boxes.shape == (len(masks), 5)
                and masks.shape[1:] == image.shape[:2]
                and name in CLASSES
            )
            answers.append(['white' if image[mask].mean() > 127 else 'black' for mask in masks])
        assert all(color in COLORS for colors in answers for color in colors)
        return answers


METRIC = dict(
    type='GenEval', detector=dict(type='StandInDetector'), colors=dict(type='StandInColors')
)


class Echo:
    """A model whose images are exact functions of idx; counts what it generates."""

    def __init__(self, fail_after=None):
        self.generated, self.fail_after = [], fail_after
        self.generator_ema = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.generator_ema.weight, 1)
        torch.nn.init.constant_(self.generator_ema.bias, 0)

    def sample(self, batch, sampling):
        if self.fail_after is not None and len(self.generated) >= self.fail_after:
            raise KeyboardInterrupt
        self.generated += [int(i) for i in batch['idx']]
        return torch.stack([self.image(int(i)) for i in batch['idx']])

    @staticmethod
    def image(idx):
        coarse = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(idx)) * 2 - 1
        return torch.nn.functional.interpolate(coarse, size=(16, 16))[0]
