# Copyright (c) mmfgm authors.
"""From images and their metadata rows to verdicts: detector, colour classifier and judge
together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfgm.errors import UsageError
from mmfgm.models import fingerprint
from mmfgm.registry import TASK_UTILS

from .judging.judge import Verdict, judge

# where weights are and how they are run, none of which verdicts depend on: the weights themselves
# count
PLACES = ('checkpoint', 'pretrained', 'weights_only', 'device', 'batch_size', 'prefilter')


@dataclass(frozen=True)
class Judged:
    """A verdict and the boxes it rests on.

    Attributes:
        verdict (Verdict): See :func:`~mmfgm.evaluation.geneval.judge`.
        boxes (dict[str, list[list[float]]]): Class name -> ``x1, y1, x2, y2, score`` of the
            detections that count.
    """

    verdict: Verdict
    boxes: dict[str, list[list[float]]]


class Scorer:
    """Judges batches of images; the models are built on the CPU and stay there until :meth:`to`.

    Args:
        detector (dict): Config of the detector, for example ``dict(type='MMDetMask2Former',
            checkpoint=...)``.
        colors (dict, optional): Config of the colour classifier, for example
            ``dict(type='ClipColors')``; not needed for prompts without colours.
        options (dict, optional): Options of :func:`~mmfgm.evaluation.geneval.judge`.

    Raises:
        UsageError: If an option is unknown or bad, or the detector leaves out what the options
            count.

    Attributes:
        identity (dict): What the verdicts on an image depend on.
        label (str): The detector, in words.
        colors_label (str, optional): The colour classifier, in words.
        comparable (bool): Whether the scores compare with published ones.
        note (str): Why not, if so.
    """

    def __init__(self, detector: dict, colors: dict | None = None, options: dict | None = None):
        self.options = dict(options or {})
        # the judge checks its options; before the models are loaded, which takes longer
        judge(dict(tag='', include=[]), {}, lambda name, rows: [], self.options)
        self.detector = TASK_UTILS.build(detector)
        lowest = min(
            self.options.get(name, math.inf) for name in ('threshold', 'counting_threshold')
        )
        if lowest < (getattr(self.detector, 'threshold', None) or 0):
            raise UsageError(
                f'the options count detections from a score of {lowest}, but the detector leaves'
                f' out those below {self.detector.threshold}; set detector.score_threshold={lowest}'
            )
        self.colors = TASK_UTILS.build(colors) if colors else None
        self.colors_label = getattr(self.colors, 'label', None)
        self.label, self.comparable = (
            self.detector.label,
            bool(self.detector.comparable and not self.options),
        )
        self.note = '; '.join(
            ([] if self.detector.comparable else [self.label])
            + (
                [f'options {self.options}, not comparable with published scores']
                if self.options
                else []
            )
        )
        self.identity = dict(
            detector=_identify(self.detector, detector),
            options=self.options,
            colors=_identify(self.colors, colors) if colors else None,
        )

    def to(self, device) -> 'Scorer':
        """Move the models; returns itself."""
        for part in (self.detector, self.colors):
            if part is not None:
                part.to(device)
        return self

    def check(self, rows: Sequence[dict]) -> None:
        """Hold metadata rows against what can be judged, before any image is looked at.

        Raises:
            UsageError: If a prompt asks for a colour and there is no colour classifier.
        """
        asking = next((row for row in rows for clause in row['include'] if 'color' in clause), None)
        if asking is not None and self.colors is None:
            raise UsageError(
                f'the prompt {asking.get("prompt")!r} asks for a colour, but no colour classifier'
                " is configured; set colors=dict(type='ClipColors') beside the detector"
            )

    def score(self, images: Sequence[np.ndarray], rows: Sequence[dict]) -> list[Judged]:
        """Judge images ``(H, W, 3)`` uint8 RGB, each by its metadata row.

        The judge asks for the colours of a clause whenever enough boxes are there, whatever it was
        told about other clauses. So a first pass with empty answers asks for exactly the crops of
        the second, and the crops of all images are classified together in between.
        """
        found = self.detector(images)
        requests: list[tuple] = []
        for image, row, detected in zip(images, rows, found):

            def ask(name, indices, image=image, detected=detected):
                requests.append(
                    (image, detected.boxes[name][indices], detected.masks(name, indices), name)
                )
                return [''] * len(indices)

            judge(row, detected.boxes, ask, self.options)
        answers = iter(self.colors.classify(requests) if requests else [])
        judged = []
        for row, detected in zip(rows, found):
            verdict = judge(row, detected.boxes, lambda name, indices: next(answers), self.options)
            boxes = {
                name: detected.boxes[name][kept].tolist() for name, kept in verdict.kept.items()
            }
            judged.append(Judged(verdict, boxes))
        return judged


def _identify(part, config: dict) -> dict:
    """The config of a detector or colour classifier, its network by what it holds instead of where
    it lies."""
    if not hasattr(part, 'network'):
        return dict(config)
    return dict(
        {key: value for key, value in config.items() if key not in PLACES},
        weights=fingerprint(part.network),
    )
