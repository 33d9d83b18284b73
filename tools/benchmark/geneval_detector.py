# Copyright (c) mmfgm authors.
r"""What GenEval's detector and judge take for an image, ours beside mmdet's own
``inference_detector``.

Ours goes in batches and enlarges only masks that can count. Theirs is what GenEval's reference
does: image by image, with all hundred masks enlarged and copied out, and lists for each class. Both
    have the same
weights, which without ``--checkpoint`` are random and made confident of ``--pairs`` (query, class)
pairs an image. Detections above 0.3 and verdicts must agree on a CPU; on a GPU, whose kernels round
otherwise for batches, how far they differ is printed. Both take turns, so that other load on the
machine meets both alike. Prints for each the median time of an image, images a second and the time
of GenEval's 2,212 images, then the ratio; on a CPU also the ratio of processor time, which other
load does not change.

    python tools/benchmark/geneval_detector.py [--images 4] [--batch-size 4] [--size 1024] [--rounds
    3] python tools/benchmark/geneval_detector.py --device cuda --images 64 --batch-size 8
    --checkpoint CHECKPOINT
"""

import argparse
import os.path as osp
import statistics
import tempfile
import time
import warnings

import numpy as np
import torch
from mmengine.registry import DefaultScope

from mmfgm.evaluation.features import full_precision
from mmfgm.evaluation.geneval import MMDetMask2Former, judge
from mmfgm.evaluation.geneval.detectors.mmdet_detector import build_network, reference_config
from mmfgm.evaluation.geneval.judging.prompts import OBJECT_NAMES

ALL_IMAGES = 2212


def random_images(n, size):
    """Coloured blobs ``(size, size, 3)`` uint8."""
    blobs = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(blobs, (size, size), mode='bicubic')
    return list(
        (255 * images).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    )


def random_checkpoint(folder):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        network = build_network(reference_config())
    head = network.panoptic_head.cls_embed
    torch.nn.init.normal_(head.weight, std=4 / head.in_features**0.5)
    path = osp.join(folder, 'random.pth')
    torch.save(network.state_dict(), path)
    return path


@torch.inference_mode()
def make_confident(detector, images, pairs):
    """Set how likely "no object" is, so that on average so many (query, class) pairs of an image
    exceed the threshold."""
    bias = detector.network.panoptic_head.cls_embed.bias
    logits = torch.cat([detector.forward([image])[0] for image in images])
    low, high = -50.0, 50.0
    for _ in range(30):
        shift = (low + high) / 2
        moved = logits + shift * (
            torch.arange(logits.shape[-1], device=logits.device) == len(OBJECT_NAMES)
        )
        found = (moved.softmax(-1)[..., :-1] > detector.threshold).sum() / len(images)
        low, high = (shift, high) if found > pairs else (low, shift)
    bias[-1] += high


def reference_model(detector):
    """mmdet's own model with the detector's weights and the settings of GenEval's reference."""
    from mmdet.apis import init_detector

    cfg = reference_config()
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline[0].to_float32 = False
    cfg.test_dataloader.dataset.pipeline = [
        step for step in pipeline if step.type != 'LoadAnnotations'
    ]
    model = init_detector(cfg, None, palette='coco', device=str(detector.device))
    model.load_state_dict(detector.network.state_dict())
    return model


def verdict(boxes, masks):
    """Of the best detection's class, asked to be red. Nothing else is measured here, so red is what
    it is."""
    best = max(boxes, key=lambda name: boxes[name][:, 4].max(initial=0), default=OBJECT_NAMES[0])
    row = dict(tag='colors', include=[{'class': best, 'count': 1, 'color': 'red'}])
    return judge(
        row,
        boxes,
        lambda name, rows: ['red' if mask.any() else 'black' for mask in masks(name, rows)],
    )


def ours(detector, images):
    found = detector(images)
    return [(one.boxes, verdict(one.boxes, one.masks)) for one in found]


def theirs(model, images):
    from mmdet.apis import inference_detector

    results = []
    for image in images:
        # as ours, which never compute in TF32
        with full_precision():
            found = inference_detector(model, image[..., ::-1]).pred_instances
        labels, masks = found.labels.cpu().numpy(), found.masks.cpu().numpy()
        rows = torch.cat([found.bboxes, found.scores[:, None]], 1).cpu().numpy()
        boxes = {name: rows[labels == index] for index, name in enumerate(OBJECT_NAMES)}
        masks_of = {name: masks[labels == index] for index, name in enumerate(OBJECT_NAMES)}
        results.append(
            (boxes, verdict(boxes, lambda name, indices, masks=masks_of: masks[name][indices]))
        )
    return results


def compare(a, b, threshold):
    """The number of detections above the threshold, and how far ours are from theirs."""
    total, differ = 0, dict(verdicts=0, detections=0, pixels=0.0, score=0.0)
    for (boxes, ours), (others, theirs) in zip(a, b):
        differ['verdicts'] += (ours.correct, ours.reason) != (theirs.correct, theirs.reason)
        for name, rows in others.items():
            mine = boxes.get(name, rows[:0])
            mine, rows = mine[mine[:, 4] > threshold], rows[rows[:, 4] > threshold]
            total += len(rows)
            differ['detections'] += abs(len(mine) - len(rows))
            if len(mine) == len(rows) > 0:
                differ['pixels'] = max(differ['pixels'], float(abs(mine - rows)[:, :4].max()))
                differ['score'] = max(differ['score'], float(abs(mine - rows)[:, 4].max()))
    return total, differ


def check(a, b, threshold, exact):
    """As :func:`compare`; with ``exact`` both must have found the same boxes, scores to 1e-5, and
    verdicts."""
    total, differ = compare(a, b, threshold)
    if exact and (
        differ['verdicts'] or differ['detections'] or differ['pixels'] or differ['score'] > 1e-5
    ):
        raise AssertionError(f'ours and theirs differ by {differ}')
    return total, differ


def timed(function, *args):
    """Seconds, processor seconds and the result of a call."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--checkpoint', default=None, help='default: random weights')
    parser.add_argument('--images', type=int, default=4)
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--size', type=int, default=1024, help='height and width of the images')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument(
        '--pairs',
        type=float,
        default=8,
        help='confident (query, class) pairs an image of random weights',
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    images = random_images(args.images, args.size)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or random_checkpoint(folder)
        detector = MMDetMask2Former(checkpoint, batch_size=args.batch_size, device=args.device)
    if not args.checkpoint:
        make_confident(detector, images, args.pairs)
    model = reference_model(detector)
    times = []
    with DefaultScope.overwrite_default_scope('mmdet'):
        # the first round warms up
        for _ in range(args.rounds + 1):
            a, b = timed(ours, detector, images), timed(theirs, model, images)
            found, differ = check(
                a[2], b[2], detector.threshold, exact=detector.device.type == 'cpu'
            )
            times.append((a[0], b[0], a[1], b[1]))
    pairs = sum(len(rows) for boxes, _ in a[2] for rows in boxes.values())
    print(
        f'{args.device}, {torch.get_num_threads()} threads: {len(images)} images of {args.size} x'
        f' {args.size}, batches of {args.batch_size}; an image has {pairs / len(images):.1f}'
        f' confident pairs, {found / len(images):.1f} above {detector.threshold}'
    )
    print(
        f'ours and theirs differ in {differ["verdicts"]} verdicts and {differ["detections"]}'
        f' detections, the others by up to {differ["pixels"]:.3g} pixels and {differ["score"]:.2g}'
        ' in score'
    )
    ours_wall, theirs_wall, ours_cpu, theirs_cpu = np.array(times[1:]).T
    for name, seconds in (('inference_detector', theirs_wall), ('ours', ours_wall)):
        each = statistics.median(seconds) / len(images)
        print(
            f'{name:20} {each:8.3f} s an image  {1 / each:8.2f} images/s '
            f' {ALL_IMAGES * each / 60:8.1f} min for {ALL_IMAGES}'
        )
    print(f'ratio                {statistics.median(ours_wall / theirs_wall):8.3f}')
    if args.device == 'cpu':
        print(
            f'ratio of processor time {statistics.median(ours_cpu / theirs_cpu):5.3f}'
            f' ({ours_cpu.mean() / len(images):.2f} s against {theirs_cpu.mean() / len(images):.2f}'
            ' s an image)'
        )


if __name__ == '__main__':
    main()
