# Copyright (c) mmfgm authors.
"""The reference's folders and results, and verdicts that survive a kill.

``FOLDER/00000/metadata.jsonl`` holds one JSON object, ``FOLDER/00000/samples/0000.png`` and so on
are its images, and ``results.jsonl`` has a row for each image. Other files are left alone, so ours
lie beside them.
"""

import glob
import hashlib
import io
import json
import math
import os
import os.path as osp
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval.judging.prompts import check_row
from mmfgm.evaluation.geneval.scorer import Judged
from mmfgm.files import parse_json, read_json_lines, read_text, sha256, write_file

METADATA = 'metadata.jsonl'
SAMPLES = 'samples'
RESULTS = 'results.jsonl'
RESULT_KEYS = ('filename', 'tag', 'prompt', 'correct', 'reason', 'metadata', 'details')


@dataclass(frozen=True)
class Entry:
    """An image of a folder.

    Args:
        name (str): Relative to the folder, ``00000/samples/0000.png``.
        row (dict): Metadata of its prompt.
    """

    name: str
    row: dict


def image_name(prompt: int, sample: int) -> str:
    """Where an image of a prompt lies in its folder, both counted from 0."""
    return f'{prompt:05d}/{SAMPLES}/{sample:04d}.png'


def encode_png(image: np.ndarray) -> bytes:
    """An image ``(H, W, 3)`` uint8 as PNG, without loss."""
    buffer = io.BytesIO()
    # the strongest compression takes longer than a one-step generator
    Image.fromarray(image).save(buffer, format='png', compress_level=1)
    return buffer.getvalue()


def write_image(folder: str, entry: Entry, content: bytes) -> None:
    """Write an image, and its prompt's metadata before it; each appears only when it is
    complete."""
    path = osp.join(folder, entry.name)
    os.makedirs(osp.dirname(path), exist_ok=True)
    metadata = osp.join(osp.dirname(osp.dirname(path)), METADATA)
    if not osp.isfile(metadata):
        write_file(metadata, json.dumps(entry.row).encode())
    write_file(path, content)


def read_image(path: str) -> np.ndarray:
    """An image file as ``(H, W, 3)`` uint8 RGB, turned as its EXIF data say.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert('RGB'))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UsageError(f'{path} cannot be read as an image: {str(e)[:200]}') from e


def _read_metadata(path: str) -> dict:
    try:
        row = parse_json(read_text(path, f'it belongs beside the folder {SAMPLES}'))
    except UsageError:
        raise
    except ValueError as e:
        place = f', line {e.lineno}' if isinstance(e, json.JSONDecodeError) else ''
        raise UsageError(
            f'{path}{place}: expected one JSON object in this file, but: {e}; write one'
        ) from e
    try:
        check_row(row)
        return row
    except UsageError as e:
        raise UsageError(f'{path}, line 1: {e}') from None


def scan_folder(folder: str, num_samples: int = 4) -> tuple[list[Entry], list[Entry]]:
    """The images of a folder by the reference's rules: folders of digits, files that begin with
    digits and ``.png``.

    Args:
        folder (str): Of the reference's layout.
        num_samples (int): Images expected of each prompt; 0 for any number.

    Returns:
        tuple[list[Entry], list[Entry]]: Those that are there and those that are missing.

    Raises:
        UsageError: If there are no prompts or more images of one than expected, or a metadata file
            is missing or bad.
    """
    try:
        names = sorted(
            name
            for name in os.listdir(folder)
            if name.isdigit() and osp.isdir(osp.join(folder, name))
        )
    except OSError as e:
        raise UsageError(f'the folder {folder!r} cannot be read: {e}') from e
    if not names:
        raise UsageError(
            f'{folder!r} holds no folders named by digits; expected'
            f' {osp.join(folder, "00000", METADATA)}, {osp.join(folder, image_name(0, 0))} and'
            ' so on'
        )
    entries = []
    missing = []
    for name in names:
        row = _read_metadata(osp.join(folder, name, METADATA))
        samples = osp.join(folder, name, SAMPLES)
        files = sorted(
            f
            for f in (os.listdir(samples) if osp.isdir(samples) else ())
            if re.match(r'\d+\.png', f) and osp.isfile(osp.join(samples, f))
        )
        entries += [Entry(f'{name}/{SAMPLES}/{file}', row) for file in files]
        if num_samples and len(files) > num_samples:
            raise UsageError(
                f'{samples!r} has {len(files)} images, expected {num_samples}: remove what does'
                ' not belong there, or say how many there are with --num-samples (0: any number)'
            )
        taken = {int(re.match(r'\d+', file)[0]) for file in files}
        free = (i for i in range(num_samples) if i not in taken)
        missing += [
            Entry(f'{name}/{SAMPLES}/{i:04d}.png', row)
            for i, _ in zip(free, range(num_samples - len(files)))
        ]
    if not entries and not missing:
        raise UsageError(
            f'the folders of {folder!r} hold no images; expected'
            f' {osp.join(folder, image_name(0, 0))} and so on'
        )
    return entries, missing


def result_row(entry: Entry, judged: Judged | None = None, reason: str = '') -> dict:
    """A row of ``results.jsonl``; without a judgement the image counts as incorrect, for a reason
    of ours."""
    verdict = judged.verdict if judged else None
    return dict(
        filename=entry.name,
        tag=entry.row['tag'],
        prompt=entry.row['prompt'],
        correct=bool(verdict and verdict.correct),
        reason=verdict.reason if verdict else reason,
        metadata=json.dumps(entry.row),
        details=json.dumps(judged.boxes if judged else {}),
    )


def write_results(folder: str, rows: Iterable[dict], images: str) -> None:
    """Write ``results.jsonl`` into a folder, with file names that lead to the folder of the
    ``images``."""
    rows = [dict(row, filename=osp.join(images, row['filename'])) for row in rows]
    write_file(osp.join(folder, RESULTS), ''.join(json.dumps(row) + '\n' for row in rows).encode())


def read_results(path: str) -> list[dict]:
    """The rows of a ``results.jsonl``, ours or the reference's.

    Raises:
        UsageError: Names file and line of a row that is not JSON or lacks a key.
    """
    rows = []
    for number, row in read_json_lines(path, 'score the images again'):
        lacking = [key for key in RESULT_KEYS if key not in row]
        if lacking:
            raise UsageError(
                f'{path}, line {number}: lacks {", ".join(lacking)}; expected the'
                ' results of GenEval, a row for each image'
            )
        wrong = _wrong_value(row)
        if wrong:
            raise UsageError(f'{path}, line {number}: {wrong}; score the images again')
        rows.append(row)
    if not rows:
        raise UsageError(f'{path} has no rows; score the images again')
    return rows


def _wrong_value(row: dict) -> str | None:
    """What is not as :func:`result_row` writes it. A text counts as true, whatever it says."""
    if not isinstance(row.get('correct'), bool):
        return f"'correct' must be true or false, but is {str(row.get('correct'))[:80]!r}"
    for key in ('filename', 'tag', 'prompt', 'reason'):
        if not isinstance(row.get(key, ''), str):
            return f'{key!r} must be a text, but is {str(row[key])[:80]!r}'
    for key in ('metadata', 'details'):
        try:
            content = parse_json(row.get(key, '{}'), dict)
            if key == 'details':
                # boxes of each object: four corners and a score
                for *box, score in (found for boxes in content.values() for found in boxes):
                    left, upper, right, lower = (float(value) for value in box)
                    if not left <= right or not upper <= lower or not math.isfinite(score):
                        raise ValueError(f'a box is {box}')
        except (TypeError, ValueError) as e:
            return f'{key!r} must be the text of a JSON object ({e})'
    return None


class VerdictLog:
    """Verdicts, appended as they are found to a file for each process; a later run takes up those
    that still hold.

    A verdict holds for one content of the image, one metadata row and one ``identity``.

    Args:
        folder (str): Where they go, in a folder ``verdicts``.
        identity (dict): All that verdicts depend on beside the image and its metadata.
        rank (int): Of this process.
    """

    def __init__(self, folder: str, identity: dict, rank: int = 0):
        self.folder = osp.join(folder, 'verdicts')
        self.rank = rank
        self.key = hashlib.sha256(
            json.dumps(identity, sort_keys=True, default=str).encode()
        ).hexdigest()[:16]

    def read(self, images: str, entries: Iterable[Entry]) -> dict[str, dict]:
        """Result rows, by name, of the entries whose verdicts hold for the files in the folder
        ``images``."""
        logged = {}
        for file in sorted(glob.glob(osp.join(glob.escape(self.folder), '*.jsonl'))):
            for line in read_text(file, 'delete it; its images are judged again').split('\n'):
                try:
                    record = parse_json(line, dict)
                    row = record['row']
                    key = row['filename'], record['sha256'], row['metadata']
                    usable = record['key'] == self.key and _wrong_value(row) is None
                    if usable:
                        logged[key] = row
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # the process was killed while it wrote this line, or it is not ours
        held = {}
        for entry in entries:
            path = osp.join(images, entry.name)
            # hashed only if there is anything to compare with
            if logged and osp.isfile(path):
                row = logged.get((entry.name, sha256(path), json.dumps(entry.row)))
                held.update({entry.name: row} if row else {})
        return held

    def append(self, rows: Iterable[dict], digests: Iterable[str]) -> None:
        """Add result rows, each with the SHA-256 of its image file."""
        os.makedirs(self.folder, exist_ok=True)
        lines = [
            json.dumps(dict(key=self.key, sha256=digest, row=row)) + '\n'
            for row, digest in zip(rows, digests)
        ]
        with open(osp.join(self.folder, f'{self.rank:05d}.jsonl'), 'a', encoding='utf-8') as f:
            # a line that a kill cut short must not swallow the next one
            f.write('\n' + ''.join(lines))
