# Copyright (c) mmfgm authors.
"""Picture sheets: what was asked for, what came, what the detector saw and how it was judged."""

import json
import os.path as osp
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmfgm.errors import UsageError

from .layout import read_image

TILE = 256
MARGIN = 8
FONT_SIZE = 13
RIGHT = (24, 128, 56)
WRONG = (192, 32, 32)
NEUTRAL = (96, 96, 96)
BOXES = ((230, 25, 75), (0, 130, 200), (60, 180, 75), (245, 130, 48), (145, 30, 180), (0, 160, 160))


def _tile(row: dict, folder: str) -> Image.Image:
    """One image with its boxes, scaled to ``TILE`` pixels, framed by its verdict."""
    color = RIGHT if row['correct'] else WRONG
    tile = Image.new('RGB', (TILE, TILE), NEUTRAL)
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(FONT_SIZE)
    try:
        image = Image.fromarray(read_image(osp.join(folder, row['filename'])))
    except UsageError:
        draw.text((MARGIN, TILE // 2), 'no image', 'white', font)
    else:
        scale = TILE / max(image.size)
        # pixels of tiny images stay visible
        image = image.resize(
            [max(1, round(side * scale)) for side in image.size],
            Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS,
        )
        tile.paste(image)
        metadata = json.loads(row['metadata'])
        details = json.loads(row['details'])
        asked = list(
            dict.fromkeys(
                clause['class']
                for key in ('include', 'exclude')
                for clause in metadata.get(key, ())
            )
        )
        # what was not asked for is a thin line below the rest
        for name in [*(name for name in details if name not in asked), *asked]:
            for *corners, score in details.get(name, ()):
                box = [value * scale for value in corners]
                if name not in asked:
                    draw.rectangle(box, outline=NEUTRAL)
                    continue
                draw.rectangle(box, outline=BOXES[asked.index(name) % len(BOXES)], width=3)
                draw.text(
                    (box[0] + 4, box[1] + 2),
                    f'{name} {score:.2f}',
                    'white',
                    font,
                    stroke_width=2,
                    stroke_fill='black',
                )
    draw.rectangle((0, 0, TILE - 1, TILE - 1), outline=color, width=4)
    return tile


def _caption(row: dict) -> str:
    reason = ' / '.join(row['reason'].split('\n'))
    text = 'correct' if row['correct'] else f'wrong: {reason}'
    lines = textwrap.wrap(text, TILE // 7)
    return '\n'.join([*lines[:3], *(['...'] if len(lines) > 3 else [])])


def draw_sheet(groups: Sequence[list[dict]], folder: str) -> np.ndarray:
    """A row of samples for each prompt, with boxes, verdict and reason.

    Args:
        groups (Sequence[list[dict]]): For each prompt the result rows of its images.
        folder (str): To which the rows' file names are relative.

    Returns:
        np.ndarray: RGB ``(H, W, 3)`` uint8.
    """
    columns = max(map(len, groups))
    line = FONT_SIZE + 5
    height = MARGIN + line + TILE + 4 * line + MARGIN
    sheet = Image.new('RGB', (MARGIN + columns * (TILE + MARGIN), len(groups) * height), 'white')
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for number, rows in enumerate(groups):
        top = number * height + MARGIN
        draw.text((MARGIN, top), rows[0]['prompt'], 'black', font)
        for column, row in enumerate(rows):
            left = MARGIN + column * (TILE + MARGIN)
            sheet.paste(_tile(row, folder), (left, top + line))
            draw.multiline_text(
                (left, top + line + TILE + 3),
                _caption(row),
                RIGHT if row['correct'] else WRONG,
                font,
            )
    return np.asarray(sheet)


def draw_sheets(rows: list[dict], folder: str, prompts: int = 20) -> dict[str, np.ndarray]:
    """A sheet for each task, of so many prompts, evenly spaced among those in order of their file
    names.

    Args:
        rows (list[dict]): Result rows.
        folder (str): To which their file names are relative.
        prompts (int): Prompts of each sheet; 0 for none.

    Returns:
        dict[str, np.ndarray]: Tag to RGB ``(H, W, 3)`` uint8.
    """
    tasks: dict[str, dict[tuple[str, str], list[dict]]] = {}
    for row in sorted(rows, key=lambda row: row['filename']):
        # two folders may have one prompt
        key = (osp.dirname(row['filename']), row['metadata'])
        tasks.setdefault(row['tag'], {}).setdefault(key, []).append(row)
    sheets = {}
    for tag, found in tasks.items() if prompts else ():
        chosen = np.unique(
            np.linspace(0, len(found) - 1, min(prompts, len(found))).round().astype(int)
        )
        sheets[tag] = draw_sheet([list(found.values())[i] for i in chosen], folder)
    return sheets
