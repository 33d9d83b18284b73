# Copyright (c) mmfgm authors.
import json
import os
import os.path as osp
import shutil
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, gather_object, get_rank, is_main_process
from mmengine.logging import MMLogger
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.evaluation.features import to_uint8
from mmfgm.evaluation.metrics import SampleMetric
from mmfgm.files import write_file
from mmfgm.registry import METRICS

from .folder.layout import (
    METADATA,
    Entry,
    VerdictLog,
    encode_png,
    image_name,
    result_row,
    write_image,
    write_results,
)
from .folder.sheets import draw_sheets
from .judging.summary import SCORES, summarize
from .scorer import Scorer


def publish(
    out_dir: str, images: str, rows: list[dict], scorer: Scorer, sheet_prompts: int, **about
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Write ``results.jsonl``, ``metrics.json`` and ``sheets/TAG.png``; returns the scores and the
    sheets.

    Args:
        out_dir (str): Where they go.
        images (str): Folder of the images, to which the rows' file names are relative.
        rows (list[dict]): Result rows of all images.
        scorer (Scorer): That judged them.
        sheet_prompts (int): Prompts on each sheet.
        **about: What else is to be said in ``metrics.json``.
    """
    rows = sorted(rows, key=lambda row: row['filename'])
    scores = summarize(rows)
    sheets = draw_sheets(rows, images, sheet_prompts)
    about = dict(
        detector=scorer.label,
        colors=scorer.colors_label,
        scorer=scorer.identity,
        comparable=scorer.comparable,
        num_images=len(rows),
        options=scorer.options,
        **about,
    )
    if scorer.note:
        about['note'] = scorer.note
        MMLogger.get_current_instance().warning(f'GenEval by {scorer.note}')
    os.makedirs(osp.join(out_dir, 'sheets'), exist_ok=True)
    write_results(out_dir, rows, images)
    for tag, sheet in sheets.items():
        write_file(osp.join(out_dir, 'sheets', f'{tag}.png'), encode_png(sheet))
    write_file(
        osp.join(out_dir, 'metrics.json'),
        (json.dumps(dict(scores=scores, **about), indent=2) + '\n').encode(),
    )
    return scores, sheets


@METRICS.register_module()
class GenEval(SampleMetric):
    """GenEval (Ghosh et al., 2023): whether images show what their prompts ask for.

    The evaluation's dataset says what item is what: :class:`GenEvalPrompts`, or another with a
    ``row(idx)``. Images, ``results.jsonl``, ``metrics.json`` and the sheets go to the evaluation's
    folder in the reference's layout. The models are on the device only while it evaluates. Values:
    a score for each task, and those of :func:`~mmfgm.evaluation.geneval.summarize`.

    Args:
        detector (dict): Config of the detector, ``dict(type='MMDetMask2Former', ...)`` for
            comparable scores.
        colors (dict, optional): Config of the colour classifier, ``dict(type='ClipColors', ...)``.
        options (dict, optional): Options of :func:`~mmfgm.evaluation.geneval.judge` other than the
            reference's.
        sheet_prompts (int): Prompts on the picture sheet of each task; 0 for no sheets. Defaults to
            10.
        keep_images (bool): False removes the images, gigabytes at 1024 pixels, once they are
            judged.
    """

    saves = True

    def __init__(
        self,
        detector: dict,
        colors: dict | None = None,
        options: dict | None = None,
        sheet_prompts: int = 10,
        keep_images: bool = True,
    ):
        super().__init__()
        self.scorer = Scorer(detector, colors, options)
        self.sheet_prompts = sheet_prompts
        self.keep_images = keep_images

    def bind(self, dataset: Any) -> None:
        """Take the metadata rows from the dataset.

        Raises:
            UsageError: If it has none, or they cannot be judged.
        """
        if not hasattr(dataset, 'row'):
            raise UsageError(
                "GenEval needs a dataset that knows its prompts' metadata, such as GenEvalPrompts,"
                f' but got {type(dataset).__name__}'
            )
        n = getattr(dataset, 'samples_per_prompt', 1)
        self.entries = [
            Entry(image_name(*divmod(i, n)), dataset.row(i)) for i in range(len(dataset))
        ]
        self.scorer.check([entry.row for entry in self.entries])

    @property
    def value_names(self) -> Sequence[str]:
        return (*dict.fromkeys(entry.row['tag'] for entry in self.entries), *SCORES)

    def reset(
        self, num_samples: int, out_dir: str | None = None, origin: dict | None = None
    ) -> None:
        super().reset(num_samples, out_dir, origin)
        self.rows: dict[int, dict] = {}
        self.out_dir = out_dir
        self.log = None
        done = [{}]
        self.sampling = (origin or {}).get('sampling', {})
        if out_dir:
            # images belong to their origin, so verdicts of another one do not count
            self.log = VerdictLog(
                out_dir, dict(scorer=self.scorer.identity, origin=origin), get_rank()
            )
            if is_main_process():
                held = self.log.read(out_dir, self.entries)
                done = [
                    {
                        i: held[entry.name]
                        for i, entry in enumerate(self.entries)
                        if entry.name in held
                    }
                ]
                if not held and osp.isdir(out_dir):
                    self._clear()
            broadcast_object_list(done)
        self.taken_up = done[0]
        if self.taken_up and is_main_process():
            MMLogger.get_current_instance().info(
                f'GenEval: {len(self.taken_up)} of {num_samples} images are judged already'
            )
        self.scorer.to(get_device())

    def _clear(self) -> None:
        """Remove what an evaluation of something else left, so that the folder holds one set of
        images."""
        for name in os.listdir(self.out_dir):
            folder = osp.join(self.out_dir, name)
            ours = name == 'verdicts' or (name.isdigit() and osp.isfile(osp.join(folder, METADATA)))
            if ours and not osp.islink(folder):
                shutil.rmtree(folder)

    def finished(self) -> Set[int]:
        return self.taken_up.keys()

    def release(self) -> None:
        self.scorer.to('cpu')
        # training needs what torch would keep for the next detector
        torch.cuda.empty_cache()

    def process(self, data_batch: dict, data_samples: Tensor) -> None:
        idx, samples = self.real(data_batch, data_samples)
        if not idx:
            return
        if samples.ndim != 4 or samples.shape[1] != 3:
            raise UsageError(
                'GenEval judges images (N, 3, H, W), but the samples have shape'
                f' {tuple(samples.shape)}; latents need model.decoder, for example'
                " dict(type='LatentDecoder')"
            )
        images = list(to_uint8(samples).permute(0, 2, 3, 1).cpu().numpy())
        entries = [self.entries[i] for i in idx]
        with ThreadPoolExecutor() as pool:
            # a PNG of 1024 pixels takes about as long as a one-step image: meanwhile the detector
            # works
            contents = pool.map(encode_png, images if self.log else ())
            judged = self.scorer.score(images, [entry.row for entry in entries])
            contents = list(contents)
        rows = [result_row(entry, found) for entry, found in zip(entries, judged)]
        if self.log:
            for entry, content in zip(entries, contents):
                write_image(self.out_dir, entry, content)
            self.log.append(rows, [sha256(content).hexdigest() for content in contents])
        self.rows.update(zip(idx, rows))

    def evaluate(self, size: int) -> dict[str, float]:
        gathered = gather_object(self.rows)
        counted = [0]
        scores: list[Any] = [None]
        if is_main_process():
            rows = {**self.taken_up, **{i: row for part in gathered for i, row in part.items()}}
            counted = [len(rows)]
            if len(rows) == size:
                scores = [self._publish(list(rows.values()))]
        broadcast_object_list(counted)
        self._check(counted[0], size)
        broadcast_object_list(scores)
        return scores[0]

    def _publish(self, rows: list[dict]) -> dict[str, float]:
        if not self.out_dir:
            return summarize(rows)
        scores, self.pictures = publish(
            self.out_dir, self.out_dir, rows, self.scorer, self.sheet_prompts, **self.sampling
        )
        if not self.keep_images:
            self._clear()
        return scores
