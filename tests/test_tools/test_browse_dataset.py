# Copyright (c) mmfgm authors.
"""The picture of what a loader yields."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmfgm.apis import FGMInferencer, browse, read_config
from mmfgm.config import resolve
from mmfgm.datasets import Digits
from mmfgm.datasets.base import TensorDataset
from mmfgm.errors import UsageError
from mmfgm.evaluation import draw_captioned, to_uint8
from mmfgm.registry import DATASETS, TASK_UTILS
from mmfgm.tools.browse_dataset import browse_dataset
from tests.test_apis.conftest import digits, shapes  # noqa: F401


def cells(picture, size, factor, first=0, nrow=4, n=4):
    """The images of a panel's first row, reduced to their own pixels."""
    step = size * factor + 4
    for i in range(n):
        x = first + 4 + i * step
        cell = picture[28 : 28 + size * factor, x : x + size * factor]
        small = cell[::factor, ::factor]
        assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), cell)
        yield small


def test_digits_are_there_pixel_by_pixel(tmp_path):
    out = tmp_path / 'digits.png'
    browse_dataset(['mmfgm::reflow/digits.py', '--num', '4', '--out', str(out)])
    images = to_uint8(Digits().x_0)[:, 0].numpy()
    found = []
    for cell in cells(np.asarray(Image.open(out)), 8, 16):
        assert (cell == cell[..., :1]).all()
        matches = (images == cell[..., 0]).all((1, 2)).nonzero()[0]
        assert len(matches) == 1
        found += matches.tolist()
    # as the sampler shuffles them
    assert len(set(found)) == 4 and found != [0, 1, 2, 3]


def test_captions_are_those_of_the_items(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        'mmfgm.apis.browsing.draw_captioned', lambda panels: drawn.update(panels) or None
    )
    browse(read_config('mmfgm::reflow/digits.py'), 20)
    images, captions = drawn['real']
    dataset = Digits()
    for image, caption in zip(images, captions):
        (match,) = (dataset.x_0 == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert caption == str(int(dataset.cond['labels'][match]))
    short = {f'train_dataloader.dataset.{part}.length': 20 for part in ('conditions', 'real')}
    browse(read_config('mmfgm::fgm/shapes_small.py', short), 3)
    config = resolve(read_config('mmfgm::fgm/shapes_small.py', short))
    # of the config's own world and kinds of captions
    dataset = DATASETS.build(config.train_dataloader.dataset.real)
    rows = [dataset[i]['x_0'] for i in range(20)]
    for image, caption in zip(*drawn['real']):
        (match,) = [i for i, row in enumerate(rows) if torch.equal(row, image)]
        assert caption == dataset.row(match)['prompt']


def test_generated_beside_real(shapes, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        'mmfgm.apis.browsing.draw_captioned', lambda panels: drawn.update(panels) or None
    )
    cfg = read_config(shapes.config)
    cfg.merge_from_dict(dict(launcher='none', work_dir=str(shapes.folder / 'browse')))
    browse(cfg, 2, shapes.weights)
    images, captions = drawn['generated']
    assert drawn['real'][0].shape == images.shape and drawn['real'][1] != captions
    inferencer = FGMInferencer(shapes.config, shapes.weights)
    assert images.shape[1:] == inferencer(captions, out='tensor')['predictions'][0].shape


@DATASETS.register_module()
class FourChannels(TensorDataset):
    def __init__(self):
        super().__init__(torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 4, 2, 2) / 4)


@TASK_UTILS.register_module()
class FirstThree:
    def __call__(self, latents):
        return latents[:, :3]


def test_latents_are_decoded_and_have_their_number():
    cfg = read_config('mmfgm::reflow/digits.py')
    cfg.train_dataloader.dataset = dict(type='FourChannels')
    with pytest.raises(UsageError, match='give the config a model.decoder'):
        browse(cfg, 4)
    cfg.model.decoder = dict(type='FirstThree')
    found = {int(cell[0, 0, 0]) for cell in cells(browse(cfg, 4), 2, 64)}
    assert found == set(to_uint8(torch.arange(4.0) / 4).tolist())


def test_a_caption_is_drawn_below_its_image():
    images = torch.zeros(2, 3, 8, 8)
    plain, said = (
        draw_captioned({'real': (images, [text, ''])}).astype(int) for text in ('', 'a red circle')
    )
    rows, columns = np.abs(plain - said).sum(2).nonzero()
    assert rows.min() >= 28 + 128 and columns.max() < 4 + 128


def test_bad_input(tmp_path):
    for argv, message in (
        (['mmfgm::fgm/digits.py', '--out', 'a.png'], 'name a checkpoint too'),
        (['mmfgm::reflow/digits.py', '--out', 'a.png', '--num', '0'], '--num must be in'),
        (['mmfgm::reflow/digits.py', '--out', 'a.txt'], 'must be a .png file'),
        (['mmfgm::reflow/toy2d_8gaussians.py', '--out', 'a.png'], 'not pictures'),
        (['mmfgm::geneval/sd3.py', '--out', 'a.png'], 'no train_dataloader'),
    ):
        with pytest.raises(UsageError, match=message):
            browse_dataset(argv)
