# Copyright (c) mmfgm authors.
"""Pictures that people look at: panels of samples side by side, and curves over NFE."""

import textwrap
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from .features import to_uint8

# of captioned pictures, in pixels: what an image is enlarged to at most, and the space below it
CELL, TEXT, GAP = 128, 28, 4


def _to_array(figure: Figure) -> np.ndarray:
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format='png', dpi=150)
    return np.asarray(Image.open(buffer).convert('RGB'))


def draw_panels(panels: dict[str, Tensor], nrow: int = 8, limit: float | None = None) -> np.ndarray:
    """Samples of several sources side by side, one titled panel each.

    Args:
        panels (dict[str, Tensor]): Title to samples: points ``(N, 2)`` become a scatter plot,
            images ``(N, C, H, W)`` in [-1, 1] a grid.
        nrow (int): Images in a row of a grid. Defaults to 8.
        limit (float, optional): Half-width of a scatter plot's axes. Defaults to that of the first
            panel.

    Returns:
        np.ndarray: RGB, ``(H, W, 3)`` uint8.

    Raises:
        ValueError: If samples are neither points nor images of 1 or 3 channels.
    """
    figure = Figure(figsize=(4 * len(panels), 4.3), layout='constrained')
    for ax, (title, samples) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        samples = samples.float().cpu()
        ax.set_title(title)
        if samples.shape[1:] == (2,):
            limit = limit or 1.1 * float(samples.abs().max())
            ax.scatter(*samples.T, s=1, alpha=0.4, linewidths=0)
            ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect='equal')
        elif samples.ndim == 4 and samples.shape[1] in (1, 3):
            # imported late, as it takes over a second
            from torchvision.utils import make_grid

            grid = make_grid(to_uint8(samples), nrow=nrow, padding=1, pad_value=255)
            ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation='nearest')
            ax.axis('off')
        else:
            raise ValueError(
                f'cannot draw samples of shape {tuple(samples.shape)}; expected (N, 2), (N, 1, H,'
                ' W) or (N, 3, H, W)'
            )
    return _to_array(figure)


def draw_captioned(panels: dict[str, tuple[Tensor, list[str]]], nrow: int = 4) -> np.ndarray:
    """Images of several sources side by side, each with a line or two of text below it.

    Images are enlarged by whole factors, so that their pixels stay what they are.

    Args:
        panels (dict[str, tuple[Tensor, list[str]]]): Title to images ``(N, C, H, W)`` in [-1, 1], C
            being 1 or 3, and N captions.
        nrow (int): Images in a row of a panel. Defaults to 4.

    Returns:
        np.ndarray: RGB, ``(H, W, 3)`` uint8.
    """
    drawn = []
    for title, (samples, captions) in panels.items():
        images = to_uint8(samples.float().cpu()).permute(0, 2, 3, 1).numpy()
        images = np.broadcast_to(images, (*images.shape[:3], 3))
        factor = max(1, CELL // images.shape[2])
        images = images.repeat(factor, 1).repeat(factor, 2)
        height, width = images.shape[1] + TEXT, images.shape[2]
        rows = -(-len(images) // nrow)
        columns = min(nrow, len(images))
        size = (columns * (width + GAP) + GAP, rows * (height + GAP) + TEXT)
        panel = Image.new('RGB', size, 'white')
        pen = ImageDraw.Draw(panel)
        pen.text((GAP, 0), title, fill='black')
        for i, (image, caption) in enumerate(zip(images, captions)):
            x = GAP + i % nrow * (width + GAP)
            y = TEXT + i // nrow * (height + GAP)
            panel.paste(Image.fromarray(np.ascontiguousarray(image)), (x, y))
            # six pixels a letter, in Pillow's own font
            lines = textwrap.wrap(caption, max(8, width // 6), max_lines=2, placeholder='...')
            pen.multiline_text((x, y + image.shape[0]), '\n'.join(lines), fill='black', spacing=1)
        drawn.append(np.asarray(panel))
    tallest = max(len(panel) for panel in drawn)
    pad = [
        np.pad(panel, ((0, tallest - len(panel)), (0, 0), (0, 0)), constant_values=255)
        for panel in drawn
    ]
    return np.concatenate(pad, 1)


def draw_over_nfe(results: dict[str, dict[int, float]], metric: str) -> np.ndarray:
    """A metric over network evaluations, one line or point for each source; RGB ``(H, W, 3)``
    uint8."""
    figure = Figure(figsize=(6, 4), layout='constrained')
    ax = figure.subplots()
    for name, values in results.items():
        nfe = sorted(values)
        ax.plot(
            nfe,
            [values[n] for n in nfe],
            marker='o' if len(nfe) > 1 else '*',
            markersize=5 if len(nfe) > 1 else 14,
            linestyle='-' if len(nfe) > 1 else 'none',
            label=name,
        )
    ax.set(xscale='log', yscale='log', xlabel='network evaluations (NFE)', ylabel=metric)
    ax.set_xticks(
        sorted({n for values in results.values() for n in values}),
        labels=[str(n) for n in sorted({n for values in results.values() for n in values})],
    )
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    return _to_array(figure)
