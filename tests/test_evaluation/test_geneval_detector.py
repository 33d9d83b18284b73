# Copyright (c) mmfgm authors.
"""Our detectors against mmdet's own code, on random weights that find things."""

import copy
import re
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval import MMDetMask2Former, TransformersMask2Former
from mmfgm.evaluation.geneval.detectors import mmdet_detector, mmdet_speed
from mmfgm.evaluation.geneval.detectors.base import Frame, measure, postprocess
from mmfgm.evaluation.geneval.judging.prompts import OBJECT_NAMES
from mmfgm.registry import TASK_UTILS
from tests.tiny_detector import (
    SIZE,
    make_mmdet_checkpoint,
    make_transformers_folder,
    mmdet_config,
    smooth_images,
)

SIZES = [(64, 64), (48, 80), (64, 64), (100, 70), (64, 64), (64, 64)]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A tiny config of mmdet and a checkpoint for it."""
    pytest.importorskip('mmcv.ops', reason='run tools/install_mmcv_ops.sh')
    cfg = mmdet_config()
    return cfg, make_mmdet_checkpoint(cfg, tmp_path_factory.mktemp('mmdet') / 'tiny.pth')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_transformers_folder(tmp_path_factory.mktemp('transformers'))


@contextmanager
def mmdet_scope():
    """mmdet's tools set the default scope for good; here it comes back."""
    before = DefaultScope._instance_dict.copy()
    DefaultScope.get_instance('mmdet-reference', scope_name='mmdet')
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


def reference(cfg, checkpoint, images):
    """mmdet's ``inference_detector``, image by image, on the settings of GenEval's port to mmdet
    3.x."""
    from mmdet.apis import inference_detector, init_detector

    cfg = copy.deepcopy(cfg)
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline[0].to_float32 = False
    cfg.test_dataloader.dataset.pipeline = [
        step for step in pipeline if step.type != 'LoadAnnotations'
    ]
    with mmdet_scope():
        model = init_detector(cfg, checkpoint, palette='coco', device='cpu')
        return [inference_detector(model, image[..., ::-1]).pred_instances for image in images]


def lists(found):
    """mmdet's instances as GenEval's reference holds them: for each class rows of box and score,
    and masks."""
    rows = torch.cat([found.bboxes, found.scores[:, None]], 1).numpy()
    return [
        (rows[found.labels == index], found.masks[found.labels == index].numpy())
        for index in range(80)
    ]


def check(detected, expected, threshold=None):
    """Boxes, masks and order equal, scores to 1e-6; returns how many detections were compared."""
    compared = 0
    for name, (rows, masks) in zip(OBJECT_NAMES, lists(expected)):
        found = detected.boxes.get(name, np.zeros((0, 5), np.float32))
        if threshold is not None:
            masks, rows = (
                masks[rows[:, 4] > np.float32(threshold)],
                rows[rows[:, 4] > np.float32(threshold)],
            )
        above = np.flatnonzero(found[:, 4] > np.float32(-1 if threshold is None else threshold))
        assert found.dtype == np.float32 and len(above) == len(rows)
        np.testing.assert_array_equal(found[above, :4], rows[:, :4])
        np.testing.assert_allclose(found[above, 4], rows[:, 4], atol=1e-6, rtol=0)
        if len(above):
            np.testing.assert_array_equal(detected.masks(name, above), masks)
        compared += len(rows)
    return compared


def test_detections_are_those_of_mmdet(weights):
    """All hundred of each image, without pre-filter; sizes with and without padding, up and
    down."""
    cfg, checkpoint = weights
    images = smooth_images(*SIZES)
    ours = MMDetMask2Former(checkpoint, cfg, prefilter=False, batch_size=4)(images)
    assert sum(check(*pair) for pair in zip(ours, reference(cfg, checkpoint, images))) == 100 * len(
        images
    )


def test_detections_above_the_threshold_are_those_of_mmdet(weights):
    cfg, checkpoint = weights
    images = smooth_images(*SIZES)
    detector = TASK_UTILS.build(dict(type='MMDetMask2Former', checkpoint=checkpoint, config=cfg))
    assert (
        sum(
            check(*pair, threshold=0.3)
            for pair in zip(detector(images), reference(cfg, checkpoint, images))
        )
        > 15
    )


@pytest.mark.slow
def test_swin_s_is_that_of_mmdet(weights, tmp_path):
    cfg = mmdet_config(tiny=False)
    checkpoint = make_mmdet_checkpoint(cfg, tmp_path / 'full.pth')
    images = smooth_images((256, 256))
    detector = MMDetMask2Former(checkpoint)
    # random weights in the published network
    assert not detector.comparable and 'weights full.pth), not comparable' in detector.label
    assert (
        sum(
            check(*pair, threshold=0.3)
            for pair in zip(detector(images), reference(cfg, checkpoint, images))
        )
        > 10
    )


def test_prefilter_changes_nothing_above_the_threshold(weights):
    cfg, checkpoint = weights
    images = smooth_images(*SIZES)
    filtered, every = (
        MMDetMask2Former(checkpoint, cfg, prefilter=prefilter)(images)
        for prefilter in (True, False)
    )
    pairs = [sum(map(len, found.boxes.values())) for found in filtered]
    assert 1 < min(pairs) and max(pairs) < 50
    for ours, theirs in zip(filtered, every):
        for name in OBJECT_NAMES:
            rows, others = (
                found.boxes.get(name, np.zeros((0, 5), np.float32)) for found in (ours, theirs)
            )
            above, among = np.flatnonzero(rows[:, 4] > 0.3), np.flatnonzero(others[:, 4] > 0.3)
            np.testing.assert_array_equal(rows[above], others[among])
            if len(above):
                np.testing.assert_array_equal(ours.masks(name, above), theirs.masks(name, among))


@pytest.mark.parametrize('kind', ['mmdet', 'transformers'])
def test_batches_change_nothing(kind, request):
    if kind == 'mmdet':
        cfg, checkpoint = request.getfixturevalue('weights')
        detectors = [MMDetMask2Former(checkpoint, cfg, batch_size=size) for size in (4, 1)]
    else:
        detectors = [
            TransformersMask2Former(request.getfixturevalue('folder'), batch_size=size, size=SIZE)
            for size in (4, 1)
        ]
    images = smooth_images(*SIZES, seed=1)
    together, alone = (detector(images) for detector in detectors)
    for ours, theirs, size in zip(together, alone, SIZES):
        assert list(ours.boxes) == list(theirs.boxes) != []
        for name, rows in ours.boxes.items():
            np.testing.assert_array_equal(rows[:, :4], theirs.boxes[name][:, :4])
            np.testing.assert_allclose(rows[:, 4], theirs.boxes[name][:, 4], atol=1e-6, rtol=0)
            masks = ours.masks(name, range(len(rows)))
            assert masks.shape == (len(rows), *size) and masks.dtype == bool
            np.testing.assert_array_equal(masks, theirs.masks(name, range(len(rows))))
            assert ours.masks(name, []).shape == (0, *size)


@pytest.mark.parametrize(
    'frame', [Frame((64, 64), (64, 64), (64, 64)), Frame((96, 64), (90, 60), (45, 30))]
)
def test_postprocessing_is_that_of_mmdet(frame):
    """Against its fusion head, which needs no compiled ops."""
    from mmdet.models import MaskFormerFusionHead
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(0)
    classes = 3 * torch.randn(30, 81, generator=generator)
    masks = 4 * torch.randn(30, frame.padded[0] // 4, frame.padded[1] // 4, generator=generator) - 2
    masks[:3] = torch.tensor([-9.0, 40.0, 0.0]).view(
        3, 1, 1
    )  # empty, full, empty: a logit of 0 is outside
    head = MaskFormerFusionHead(
        80, 0, test_cfg=dict(panoptic_on=False, instance_on=True, max_per_image=100)
    )
    sample = DetDataSample(metainfo=dict(img_shape=frame.resized, ori_shape=frame.image))
    large = torch.nn.functional.interpolate(
        masks[None], frame.padded, mode='bilinear', align_corners=False
    )
    expected = head.predict(classes[None], large, [sample], rescale=True)[0]['ins_results']
    assert check(postprocess(classes, masks, frame), expected) == 100
    assert check(postprocess(classes, masks, frame, threshold=0.2), expected, threshold=0.2) > 5
    none = postprocess(classes, masks, frame, threshold=0.999)
    assert none.boxes == {}


def test_a_score_never_exceeds_its_class_probability():
    """What the pre-filter rests on, where rounding could break it: probabilities of nearly and of
    exactly one."""
    for logit in (8.0, 15.0, 16.6, 17.0, 20.0, 90.0):
        logits = logit + torch.rand(3, 300, 301, generator=torch.Generator().manual_seed(0))
        boxes, quality = measure(logits, Frame((300, 301), (300, 301), (300, 301)))
        assert 0.999 < quality.min() and quality.max() <= 1
        assert boxes.tolist() == [[0, 0, 301, 300]] * 3


def test_transformers_sees_the_image_as_its_own_processor_does(folder):
    from transformers import Mask2FormerImageProcessor

    (image,) = smooth_images((64, 96))
    detector, seen = TransformersMask2Former(folder, size=(96, 64)), []
    detector.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    detector([image])
    pixels = Mask2FormerImageProcessor(do_resize=False, size_divisor=32)(
        image, return_tensors='pt'
    )['pixel_values']
    torch.testing.assert_close(seen[0], pixels, atol=1e-5, rtol=0)
    assert (
        not detector.comparable
        and 'not comparable' in detector.label
        and str(folder) not in detector.label
    )


def without(checkpoint, path, change):
    content = torch.load(checkpoint, weights_only=True)
    content['state_dict'] = change(dict(content['state_dict']))
    torch.save(content, path)
    return str(path)


def test_checkpoint_of_mmdet_2_is_renamed(weights, tmp_path):
    cfg, checkpoint = weights
    old = [
        ('(pixel_decoder.*)self_attn', r'\1attentions.0'),
        ('(transformer_decoder.*)cross_attn', r'\1attentions.0'),
        ('(transformer_decoder.*)self_attn', r'\1attentions.1'),
        (r'(decoder.*)\.ffn\.', r'\1.ffns.0.'),
    ]

    def to_old(state):
        for pattern, replacement in old:
            state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
        return state

    path = without(checkpoint, tmp_path / 'v2.pth', to_old)
    names = torch.load(path, weights_only=True)['state_dict']
    assert 'panoptic_head.transformer_decoder.layers.0.attentions.1.attn.in_proj_weight' in names
    assert 'panoptic_head.pixel_decoder.encoder.layers.1.ffns.0.layers.0.0.weight' in names
    image = smooth_images((64, 64))
    ours, theirs = (
        MMDetMask2Former(weights, cfg)(image)[0].boxes for weights in (path, checkpoint)
    )
    assert ours and all(np.array_equal(rows, theirs[name]) for name, rows in ours.items())


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda state: {k: v for k, v in state.items() if k != 'panoptic_head.cls_embed.bias'},
            'cls_embed.bias.* is missing',
        ),
        (
            lambda state: {**state, 'bbox_head.weight': torch.zeros(1)},
            'bbox_head.weight.* has no place',
        ),
        (
            lambda state: {**state, 'panoptic_head.cls_embed.bias': torch.zeros(134)},
            r'has shape \(134,\)',
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(weights, tmp_path, change, message):
    cfg, checkpoint = weights
    with pytest.raises(UsageError, match=f'(?s){message}.*near zero.*c9d0c4f2.pth'):
        MMDetMask2Former(without(checkpoint, tmp_path / 'bad.pth', change), cfg)


def test_bad_input(weights, monkeypatch):
    cfg, checkpoint = weights
    with pytest.raises(UsageError, match='does not exist'):
        MMDetMask2Former('nowhere.pth', cfg)
    with pytest.raises(UsageError, match="config 'nowhere.py' cannot be read: FileNotFoundError"):
        MMDetMask2Former(checkpoint, 'nowhere.py')
    other = copy.deepcopy(cfg)
    other.model.panoptic_head.num_things_classes = 79
    with pytest.raises(UsageError, match='79 things and 0 stuff.*mask2former_swin-s'):
        MMDetMask2Former(checkpoint, other)
    with pytest.raises(UsageError, match='batch_size from 1'):
        MMDetMask2Former(checkpoint, cfg, batch_size=0)
    for image in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), 'a.png'):
        with pytest.raises(UsageError, match='uint8 arrays'):
            MMDetMask2Former(checkpoint, cfg)([image])
    asked = []
    monkeypatch.setattr(mmdet_detector, 'download', lambda *args: asked.append(args) or checkpoint)
    assert (
        MMDetMask2Former('https://example.com/a.pth', cfg)([]) == []
        and asked[0][0] == 'https://example.com/a.pth'
    )


@pytest.mark.parametrize(
    'missing, message',
    [
        ('mmcv.ops', 'bash tools/install_mmcv_ops.sh.*TransformersMask2Former'),
        ('mmdet.models', 'pip install "mmfgm.geneval.".*install_mmcv_ops.sh'),
    ],
)
def test_missing_parts_are_named(monkeypatch, missing, message):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=message):
        MMDetMask2Former('nowhere.pth')


def test_op_is_held_against_its_pytorch_spelling(weights, monkeypatch):
    from mmcv.ops import multi_scale_deform_attn as ops

    def compiled(value, shapes, starts, places, weights, step):
        assert starts.tolist() == [0, 24]
        return factor * ops.multi_scale_deformable_attn_pytorch(value, shapes, places, weights)

    detector = MMDetMask2Former(weights[1], weights[0])
    monkeypatch.setattr(detector.network, 'to', lambda device: None)
    monkeypatch.setattr(ops.MultiScaleDeformableAttnFunction, 'apply', compiled)
    cpu = torch.device('cpu')
    for factor, fails in ((1, False), (1.01, True)):  # noqa: B007, `compiled` reads factor
        if fails:
            with pytest.raises(UsageError, match='is wrong by.*install_mmcv_ops'):
                mmdet_detector.check_deformable_attention(cpu)
        else:
            mmdet_detector.check_deformable_attention(cpu)
    tested = []
    monkeypatch.setattr(mmdet_detector, 'check_deformable_attention', tested.append)
    for device in ('cpu', 'cuda', 'cpu', 'cuda'):
        assert detector.to(device) is detector
    assert tested == [torch.device('cuda')]


def test_shortcuts_give_the_same_bits(weights):
    """Over more queries than one block, some of whose samples lie outside."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    torch.manual_seed(0)
    shapes, queries = torch.tensor([[5, 7], [10, 14]]), 2 * mmdet_speed.BLOCK + 3
    args = (
        torch.randn(2, 175, 4, 8),
        shapes,
        1.2 * torch.rand(2, queries, 4, 2, 3, 2) - 0.1,
        torch.rand(2, queries, 4, 2, 3),
    )
    assert torch.equal(
        mmdet_speed.deformable_attention(*args), multi_scale_deformable_attn_pytorch(*args)
    )
    head = MMDetMask2Former(weights[1], weights[0]).network.panoptic_head
    args = torch.randn(2, 20, 32), torch.randn(2, 32, 16, 24), (4, 6)
    assert all(map(torch.equal, head._forward_head(*args), type(head)._forward_head(head, *args)))


def test_transformers_refuses_other_models(folder, tmp_path):
    with pytest.raises(UsageError, match='80 classes, but .* is a mask2former of 7'):
        TransformersMask2Former(make_transformers_folder(tmp_path / 'classes', num_labels=7))
    from transformers import BertConfig

    BertConfig(num_labels=80).save_pretrained(tmp_path / 'bert')
    with pytest.raises(UsageError, match='is a bert of 80'):
        TransformersMask2Former(str(tmp_path / 'bert'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UsageError, match='(?s)no Mask2Former can be loaded.*local folder'):
        TransformersMask2Former(str(tmp_path / 'empty'))
