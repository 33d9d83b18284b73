# Copyright (c) mmfgm authors.
"""Curves of a run: panels of scalars over iterations, as SVG for a page or as one PNG for a
document."""

import itertools
import math
import os.path as osp
import re
from collections.abc import Sequence
from io import BytesIO, StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .data import Run, Series

# legible on white and on black
COLOURS = ('#3b82f6', '#f97316', '#16a34a', '#a855f7', '#64748b')
# stands for the page's text colour until the SVG is written
TEXT = '#123456'
PANEL = (4.4, 2.5)  # inches
FROM_ZERO = (
    'learning rate',
    'samples per second',
    'seconds per iteration',
    'share of the time',
    'GPU memory, MB',
)
# ends the titles of panels whose curves go over network calls instead of iterations
OVER_NFE = ' over network calls'


def over_nfe(run: Run, beside: Sequence[Run] = ()) -> dict[str, dict[str, Series]]:
    """Panel to curve of what ``tools/test.py`` measured: each metric over network calls, of every
    network; a teacher that several runs measured comes once."""
    runs = (run, *beside)
    panels: dict[str, dict[str, Series]] = {}
    for label, each in zip(_labels(runs), runs):
        for metric, networks in each.tables.items():
            panel = panels.setdefault(metric + OVER_NFE, {})
            for network, values in networks.items():
                series = {int(nfe): value for nfe, value in values.items()}
                if series not in panel.values():
                    panel[f'{label}, {network}' if beside else network] = series
    # one number of calls makes no curve
    return {
        title: {name: dict(sorted(series.items())) for name, series in curves.items()}
        for title, curves in panels.items()
        if len({nfe for series in curves.values() for nfe in series}) > 1
    }


def _labels(runs: Sequence[Run]) -> list[str]:
    labels = [osp.basename(osp.abspath(run.work_dir)) for run in runs]
    return labels if len(set(labels)) == len(labels) else [run.work_dir for run in runs]


def group_scalars(run: Run, beside: Sequence[Run] = ()) -> dict[str, dict[str, dict[str, Series]]]:
    """Section to panel to curve: metrics, losses, gradient norms, learning rates and throughput of
    a run.

    Args:
        run (Run): See :func:`~mmfgm.apis.report.data.read_run`.
        beside (Sequence[Run]): Other runs whose curves of the same metrics and losses are drawn in
            the same panels.
    """
    left = dict(run.scalars)

    def take(names: list[str]) -> dict[str, Series]:
        return {name: left.pop(name) for name in names}

    def matching(pattern: str) -> dict[str, Series]:
        """Curves by the last group of the pattern that is there: a network's name where a phase
        trains several."""
        found = {name: match for name in left if (match := re.fullmatch(pattern, name))}
        return {
            [group for group in found[name].groups() if group][-1]: series
            for name, series in take(list(found)).items()
        }

    drawn_runs = (run, *beside)
    labels = _labels(drawn_runs)

    def together(name: str) -> dict[str, Series]:
        return {label: each.scalars.get(name, {}) for label, each in zip(labels, drawn_runs)}

    metrics = take(run.metrics)
    # the ends of a metric's interval belong into its panel
    ends = {
        f'{name}_{end}': name
        for name in metrics
        for end in ('low', 'high')
        if f'{name}_{end}' in metrics
    }
    sections = {
        'Metrics': {
            name: {
                **together(name),
                **{end.rsplit('_', 1)[1]: metrics[end] for end in ends if ends[end] == name},
            }
            for name in metrics
            if name not in ends
        },
        'Optimization': {
            'gradient norm, before clipping': matching(r'(.+)/grad_norm(?:_(.+))?'),
            'learning rate': matching(r'(.+)\.lr'),
        },
        'Throughput': {
            'samples per second': {'samples': left.pop('samples_per_second', {})},
            'seconds per iteration': {
                'seconds': left.pop('time', {}),
                'of these, waiting for data': left.pop('data_time', {}),
                'of these, loading data and generating samples': left.pop('prepare_time', {}),
            },
            'share of the time': shares if len(shares := matching(r'(.+)/time_share')) > 1 else {},
            'GPU memory, MB': {'memory': left.pop('memory', {})},
        },
    }
    # what is left is what the phases log of their own
    sections['Losses'] = {name: together(name) for name in left}
    order = ('Metrics', 'Losses', 'Optimization', 'Throughput')
    return {
        name: panels
        for name in order
        if (
            panels := {
                title: drawn
                for title, curves in sections[name].items()
                if (drawn := {k: v for k, v in curves.items() if v})
            }
        )
    }


def _draw(ax: Axes, title: str, curves: dict[str, Series]) -> None:
    many = len(curves) > len(COLOURS)
    palette = matplotlib.colormaps['tab20']
    colours = [palette(i) for i in range(palette.N)] if many else COLOURS
    for colour, (label, series) in zip(itertools.cycle(colours), curves.items()):
        ax.plot(
            list(series),
            list(series.values()),
            color=colour,
            linewidth=1.4,
            # a $ in a name is no formula, and one alone would end the report
            label=label.replace('$', r'\$'),
            marker='o' if len(series) < 15 else None,
            markersize=3,
        )
    values = [
        value for series in curves.values() for value in series.values() if math.isfinite(value)
    ] or [0]
    if title in FROM_ZERO:
        ax.set_ylim(0, 1.1 * max(values) or 1)
    elif min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale('log')
    ax.set_title(title, fontsize=10, loc='left', parse_math=False)
    if title.endswith(OVER_NFE):
        ax.set_xscale('log')
        calls = sorted({nfe for series in curves.values() for nfe in series})
        ax.set_xticks(calls, labels=[str(nfe) for nfe in calls])
        ax.minorticks_off()
        ax.set_xlabel('network calls (NFE)', fontsize=8)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel('iteration', fontsize=8)
    ax.tick_params(labelsize=8, which='both')
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[['top', 'right']].set_visible(False)
    if many:  # beside the curves, which it would cover
        ax.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
    elif len(curves) > 1:
        ax.legend(fontsize=8, frameon=False)


def curves_svg(title: str, curves: dict[str, Series]) -> str:
    """One panel as an ``<svg>`` element whose text and axes have the colour of the text around
    it."""
    colours = {
        f'{part}color': TEXT
        for part in ('text.', 'axes.edge', 'axes.label', 'axes.title', 'xtick.', 'ytick.', 'grid.')
    }
    with matplotlib.rc_context({**colours, 'svg.fonttype': 'none'}):
        figure = Figure(figsize=PANEL, layout='constrained')
        figure.patch.set_alpha(0)
        ax = figure.subplots()
        ax.patch.set_alpha(0)
        _draw(ax, title, curves)
        buffer = StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict(Date=None))
    svg = buffer.getvalue()
    return svg[svg.index('<svg') :].replace(TEXT, 'currentColor')


def curves_png(panels: dict[str, dict[str, Series]], columns: int = 2) -> bytes:
    """All panels in one PNG of few colours, for a document; about 10 KB a panel."""
    rows = -(-len(panels) // columns)
    many = any(len(curves) > len(COLOURS) for curves in panels.values())
    width, height = (PANEL[0] * 1.5, PANEL[1] * 1.4) if many else PANEL
    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (title, curves) in zip(axes, panels.items()):
        _draw(ax, title, curves)
    for ax in axes[len(panels) :]:
        ax.axis('off')
    drawn = BytesIO()
    small = BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    Image.open(drawn).convert('RGB').quantize(64).save(small, format='png', optimize=True)
    return small.getvalue()
