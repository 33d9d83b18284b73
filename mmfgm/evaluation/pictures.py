# Copyright (c) mmfgm authors.
"""Pictures that people look at: panels of samples side by side, and curves over NFE."""

from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .features import to_uint8


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
