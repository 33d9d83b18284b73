# Copyright (c) mmfgm authors.
"""Which weights gave a verdict, and whether they are those of published scores."""

import os

import pytest
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from mmfgm.evaluation.geneval import MMDetMask2Former, Scorer
from mmfgm.evaluation.geneval.detectors import mmdet_detector
from tests.tiny_detector import (
    make_clip,
    make_mmdet_checkpoint,
    make_transformers_folder,
    mmdet_config,
)


def test_published_weights_are_known_by_their_checksum(tmp_path, monkeypatch):
    """Other weights are not comparable, nor are the published ones in a config of one's own."""
    pytest.importorskip('mmcv.ops', reason='run tools/install_mmcv_ops.sh')
    cfg, warned = mmdet_config(), []
    checkpoint = make_mmdet_checkpoint(cfg, tmp_path / 'tiny.pth')
    monkeypatch.setattr(MMLogger.get_current_instance(), 'warning', warned.append)
    monkeypatch.setattr(mmdet_detector, 'reference_config', lambda: cfg)
    for digest, label in (
        ('c9d0c4f2aa', 'Mask2Former Swin-S (mmdet)'),
        ('743b7d99aa', 'Mask2Former Swin-S (mmdet)'),
        (
            'c9d0c4f3aa',
            'Mask2Former (mmdet, weights tiny.pth), not comparable with published GenEval scores',
        ),
    ):
        monkeypatch.setattr(mmdet_detector, 'sha256', lambda path, digest=digest: digest)
        found = MMDetMask2Former(checkpoint)
        assert found.label == label and found.comparable == ('not comparable' not in label)
        own = MMDetMask2Former(checkpoint, cfg)
        assert not own.comparable and 'not comparable' in own.label
    assert len(warned) == 2 and 'none of the published files' in warned[0]


def test_verdicts_belong_to_weights_not_to_where_they_lie(tmp_path):
    """A file that is replaced under its name gives other verdicts; one that is moved, or runs in
    other batches, the same."""
    model, clip = make_clip(tmp_path)

    def identity(folder, **more):
        with DefaultScope.overwrite_default_scope('mmfgm'):
            return Scorer(
                dict(type='TransformersMask2Former', pretrained=str(folder), **more),
                dict(type='ClipColors', model=model, pretrained=clip),
            ).identity

    folder = tmp_path / 'detector'
    make_transformers_folder(folder)
    first = identity(folder)
    assert identity(folder, batch_size=3, prefilter=False, device='cpu') == first
    assert identity(folder, score_threshold=0.2) != first != identity(folder, size=(96, 64))
    os.rename(folder, tmp_path / 'moved')
    assert identity(tmp_path / 'moved') == first
    make_transformers_folder(folder, seed=1)
    replaced = identity(folder)
    assert replaced != first and replaced['colors'] == first['colors']
    make_clip(tmp_path, seed=1)
    assert identity(folder)['colors'] != first['colors']
