# Copyright (c) mmfgm authors.
"""Generating and scoring a folder of images, shared by several processes and taken up where a run
was killed."""

import hashlib
import json
import os
import os.path as osp
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from mmengine.config import Config
from mmengine.dist import barrier, gather_object, get_dist_info
from torch.utils.data import DataLoader, Dataset

from mmfgm.datasets import item_seed
from mmfgm.errors import UsageError
from mmfgm.files import check_work_dir, differences, read_json, sha256, write_file
from mmfgm.processes import Progress, on_main

from .folder.layout import (
    Entry,
    VerdictLog,
    encode_png,
    image_name,
    read_image,
    result_row,
    scan_folder,
    write_image,
)
from .metric import publish
from .pipelines import DiffusersPipeline
from .scorer import Scorer

ORIGIN = 'origin.json'
SCORING_CONFIG = 'mmfgm::_base_/evaluation/geneval.py'
TASKS = dict(
    single_object='single object',
    two_object='two objects',
    counting='counting',
    colors='colors',
    position='position',
    color_attr='color attribution',
)


def _read_origin(folder: str, origin: dict) -> dict:
    """What the images of a folder are of, which must be ``origin``; begins the folder if it is new.

    Raises:
        UsageError: If the folder holds something else.
    """
    path = osp.join(folder, ORIGIN)
    try:
        os.makedirs(folder, exist_ok=True)
        if not osp.isfile(path):
            if any(name.isdigit() for name in os.listdir(folder)):
                raise UsageError(
                    f'{folder!r} holds images already, but {path} does not say of what; name'
                    ' another folder with --work-dir, or score them with python tools/geneval.py'
                    ' score'
                )
            write_file(path, json.dumps(origin, indent=1).encode())
        found = read_json(path, 'name another folder with --work-dir', dict)
    except (OSError, ValueError) as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(
            f'the folder {folder!r} cannot be used: {e}; name another with --work-dir'
        ) from e
    differs = list(differences(origin, {key: found.get(key) for key in origin}))
    if differs:
        raise UsageError(
            f'{folder!r} holds images of something else: {"; ".join(differs[:4])}; name another'
            ' folder with --work-dir, or delete it'
        )
    return found


def generate_images(
    pipeline: DiffusersPipeline, rows: list[dict], folder: str, num_samples: int, seed: int
) -> int | None:
    """Generate the images of a folder that are not there yet.

    Args:
        pipeline (DiffusersPipeline): Loaded.
        rows (list[dict]): Metadata of the prompts.
        folder (str): Gets the reference's layout, and ``origin.json``: what the images are of.
        num_samples (int): Images of each prompt.
        seed (int): Selects other noise.

    Returns:
        int, optional: Network evaluations of an image, counted.
    """
    rank, world_size = get_dist_info()
    entries = [
        Entry(image_name(prompt, sample), row)
        for prompt, row in enumerate(rows)
        for sample in range(num_samples)
    ]

    def plan() -> tuple[dict, list[int]]:
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        origin = json.loads(
            json.dumps(
                dict(pipeline.identity, prompts=digest, num_samples=num_samples, seed=seed),
                default=str,
            )
        )
        found = _read_origin(folder, origin)
        return found, [
            i for i, entry in enumerate(entries) if not osp.isfile(osp.join(folder, entry.name))
        ]

    origin, todo = on_main(plan)
    if rank == 0 and len(todo) < len(entries):
        print(
            f'{len(entries) - len(todo):,} of {len(entries):,} images are there already', flush=True
        )
    mine = todo[rank::world_size]
    progress = Progress(len(mine), 'image')
    for first in range(0, len(mine), pipeline.batch_size):
        part = mine[first : first + pipeline.batch_size]
        images = pipeline.generate(
            [entries[i].row['prompt'] for i in part], [item_seed(i, seed) for i in part]
        )
        with ThreadPoolExecutor() as pool:
            for i, content in zip(part, pool.map(encode_png, images)):
                write_image(folder, entries[i], content)
        if rank == 0 and origin.get('nfe') != pipeline.nfe:
            origin['nfe'] = pipeline.nfe
            write_file(osp.join(folder, ORIGIN), json.dumps(origin, indent=1).encode())
        progress.step(len(part))
    barrier()
    return origin.get('nfe')


class _Images(Dataset):
    """``(entry, image or None, digest of the file, why it cannot be read)``."""

    def __init__(self, folder: str, entries: list[Entry]):
        self.folder = folder
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Entry, np.ndarray | None, str, str]:
        entry = self.entries[index]
        path = osp.join(self.folder, entry.name)
        try:
            return entry, read_image(path), sha256(path), ''
        except (UsageError, OSError) as e:
            return entry, None, '', str(e)


def score_folder(
    folder: str,
    scorer: Scorer,
    out_dir: str,
    num_samples: int = 4,
    skip_bad: bool = False,
    batch_size: int = 8,
    num_workers: int = 2,
    sheet_prompts: int = 20,
    nfe: int | None = None,
) -> dict | None:
    """Judge the images of a folder in the reference's layout, and write what :func:`publish`
    writes.

    Args:
        folder (str): Of the images.
        scorer (Scorer): On its device.
        out_dir (str): Where results go.
        num_samples (int): Images expected of each prompt; 0 for any number.
        skip_bad (bool): Leave missing and unreadable images out, instead of counting them as wrong.
        batch_size (int), num_workers (int): Per process.
        sheet_prompts (int): Prompts on each sheet.
        nfe (int, optional): Network evaluations of an image, to be written beside the scores.

    Returns:
        dict, optional: ``scores``, result ``rows`` and what is ``bad``, name to reason; on the main
            process.
    """
    rank, world_size = get_dist_info()
    log = VerdictLog(out_dir, scorer.identity, rank)

    def plan() -> tuple[list[Entry], list[Entry], dict[str, dict]]:
        entries, missing = scan_folder(folder, num_samples)
        scorer.check([entry.row for entry in [*entries, *missing]])
        check_work_dir(out_dir)
        return entries, missing, log.read(folder, entries)

    entries, missing, held = on_main(plan)
    todo = [entry for entry in entries if entry.name not in held]
    if rank == 0:
        about = f', {len(held):,} are judged already' if held else ''
        print(f'{folder}: {len(entries):,} images{about}, {len(missing):,} missing', flush=True)
    rows = []
    bad = {entry.name: 'missing' for entry in missing} if rank == 0 else {}
    mine = todo[rank::world_size]
    progress = Progress(len(mine), 'image')
    for batch in DataLoader(
        _Images(folder, mine), batch_size, num_workers=num_workers, collate_fn=list
    ):
        good = [item for item in batch if item[1] is not None]
        bad.update({entry.name: reason for entry, image, _, reason in batch if image is None})
        found = (
            scorer.score([image for _, image, _, _ in good], [entry.row for entry, *_ in good])
            if good
            else []
        )
        new = [result_row(item[0], judged) for item, judged in zip(good, found)]
        log.append(new, [digest for _, _, digest, _ in good])
        rows += new
        progress.step(len(batch))
    gathered = gather_object((rows, bad))
    if rank != 0:
        return None
    rows = [*held.values(), *(row for part, _ in gathered for row in part)]
    bad = dict(sorted(item for _, part in gathered for item in part.items()))
    if not skip_bad:
        rows += [
            result_row(entry, reason=f'no image: {bad[entry.name]}')
            for entry in [*entries, *missing]
            if entry.name in bad
        ]
    if not rows:
        raise UsageError(
            f'none of the {len(bad)} images of {folder!r} can be read:'
            f' {next(iter(bad.items()), "")}'
        )
    scores, _ = publish(
        out_dir,
        folder,
        rows,
        scorer,
        sheet_prompts,
        nfe=nfe,
        bad=bad,
        skipped=bool(skip_bad and bad),
    )
    return dict(scores=scores, rows=rows, bad=bad)


def find_metric(cfg: Config) -> dict:
    """The config of the GenEval metric among the evaluations of a config.

    Raises:
        UsageError: If there is none.
    """
    found = [
        metric
        for evaluation in (cfg.get('evaluations') or {}).values()
        for metric in evaluation.get('metrics', {}).values()
        if str(metric.get('type')).split('.')[-1] == 'GenEval'
    ]
    if not found:
        raise UsageError(
            'the config has no metric of type GenEval among its evaluations; begin it with _base_'
            f' = {SCORING_CONFIG!r}'
        )
    return found[0]


def format_scores(scores: dict[str, float], rows: list[dict], nfe: int | None = None) -> str:
    """A table of the scores, tasks in the paper's order."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row['tag']] = counts.get(row['tag'], 0) + 1
    tags = sorted(counts, key=lambda tag: list(TASKS).index(tag) if tag in TASKS else len(TASKS))
    lines = [(TASKS.get(tag, tag), f'{scores[tag]:.4f}', f'{counts[tag]:,} images') for tag in tags]
    lines += [
        (
            'overall',
            f'{scores["overall"]:.4f}',
            f'95% interval {scores["overall_low"]:.4f} to {scores["overall_high"]:.4f}',
        ),
        ('correct images', f'{100 * scores["images"]:.2f}%', f'of {len(rows):,}'),
        (
            'prompts with one',
            f'{100 * scores["prompts"]:.2f}%',
            f'of {len({row["metadata"] for row in rows}):,}',
        ),
        (
            'NFE',
            '-' if nfe is None else str(nfe),
            'not known' if nfe is None else 'network evaluations of an image, counted',
        ),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return '\n'.join(
        f'{name.ljust(widths[0])}  {value.rjust(widths[1])}  {about}'
        for name, value, about in lines
    )
