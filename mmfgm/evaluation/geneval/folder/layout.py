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
from mmfgm.files import sha256, write_file

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
        with open(path, encoding='utf-8') as f:
            row = json.load(f)
        check_row(row)
        return row
    except json.JSONDecodeError as e:
        raise UsageError(
            f'{path}, line {e.lineno}: expected one JSON object in this file, but: {e.msg}'
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(
            f'{path} cannot be read: {e}; expected it beside the folder {SAMPLES}'
        ) from e
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
    try:
        with open(path, encoding='utf-8') as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    lacking = [key for key in RESULT_KEYS if key not in rows[-1]]
                    if lacking:
                        raise UsageError(
                            f'{path}, line {number}: lacks {", ".join(lacking)}; expected the'
                            ' results of GenEval, a row for each image'
                        )
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f'{path} cannot be read: {e}') from e
    except (json.JSONDecodeError, TypeError) as e:
        raise UsageError(f'{path}, line {number}: not a JSON object: {e}') from e
    if not rows:
        raise UsageError(f'{path} has no rows; score the images again')
    return rows


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
            with open(file, encoding='utf-8') as f:
                for line in f:
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError:
                        continue  # the process was killed while it wrote this line
                    if record['key'] == self.key:
                        logged[
                            record['row']['filename'], record['sha256'], record['row']['metadata']
                        ] = record['row']
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
