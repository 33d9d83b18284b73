# Copyright (c) mmfgm authors.
"""A report of a run as one HTML file that needs nothing else: no network, no scripts, pictures
inside."""

import base64
import os.path as osp
import statistics
import time
from collections.abc import Sequence
from html import escape

from mmengine.config import Config

from mmfgm.version import __version__

from .curves import curves_svg, group_scalars, over_nfe
from .data import Run, closest_packaged_config, config_difference

STYLE = """
:root {
  color-scheme: light dark;
  --line: #d4d4d8; --soft: #f4f4f5; --muted: #52525b; --link: #1d4ed8;
}
@media (prefers-color-scheme: dark) {
  :root { --line: #3f3f46; --soft: #27272a; --muted: #a1a1aa; --link: #93c5fd; }
}
* { box-sizing: border-box; }
body {
  font: 15px/1.5 system-ui, sans-serif;
  max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px;
}
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 21px; margin: 44px 0 8px; border-bottom: 1px solid var(--line); }
h3 { font-size: 16px; margin: 26px 0 8px; }
p, figcaption, footer { color: var(--muted); }
p { margin: 6px 0; }
a { color: var(--link); }
nav a { margin-right: 18px; }
.grid {
  display: grid; align-items: start; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(330px, 1fr));
}
.wide { grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }
figure {
  margin: 0; padding: 8px; border: 1px solid var(--line); border-radius: 8px; min-width: 0;
}
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { background: #fff; }
figcaption { font-size: 13px; padding: 4px 2px 0; }
.table { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; vertical-align: top;
  padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line);
}
th { font-weight: 600; }
td code { overflow-wrap: anywhere; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: 12px; border-radius: 8px; overflow-x: auto; }
summary { cursor: pointer; }
@media (max-width: 560px) { .grid, .wide { grid-template-columns: 1fr; } }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are text and are escaped, those in backquotes are code."""

    def cell(text: str) -> str:
        return (
            f'<code>{escape(text[1:-1])}</code>' if text[:1] == text[-1:] == '`' else escape(text)
        )

    head = ''.join(f'<th>{escape(name)}</th>' for name in header)
    body = ''.join(
        '<tr>' + ''.join(f'<td>{cell(text)}</td>' for text in row) + '</tr>' for row in rows
    )
    head = f'<thead><tr>{head}</tr></thead>' if any(header) else ''
    return f'<div class="table"><table>{head}<tbody>{body}</tbody></table></div>'


def picture(path: str, caption: str) -> str:
    """A PNG file as a figure, its bytes in the page."""
    with open(path, 'rb') as f:
        data = base64.b64encode(f.read()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f'<figcaption>{escape(caption)}</figcaption></figure>'
    )


def page(title: str, about: str, sections: dict[str, str]) -> str:
    """The whole document of titled sections, with links to them if there are several."""
    ids = {name: f's{i}' for i, name in enumerate(sections)}
    links = ''.join(f'<a href="#{ids[name]}">{escape(name)}</a>' for name in sections)
    body = ''.join(
        f'<section id="{ids[name]}"><h2>{escape(name)}</h2>{content}</section>'
        for name, content in sections.items()
    )
    nav = f'<nav>{links}</nav>' if len(ids) > 1 else ''
    written = f'Written by mmfgm {__version__} on {time.strftime("%Y-%m-%d %H:%M")}.'
    return (
        '<!DOCTYPE html>\n'
        '<html lang="en"><head><meta charset="utf-8">'
        f'<title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p>{escape(about)}</p>{nav}{body}'
        f'<footer><p>{written}</p></footer></body></html>\n'
    )


def run_section(
    run: Run,
    base: tuple[str, Config] | None = None,
    max_pictures: int = 12,
    beside: Sequence[Run] = (),
) -> str:
    """Everything about one run.

    Args:
        run (Run): See :func:`~mmfgm.apis.report.data.read_run`.
        base (tuple[str, Config], optional): Name and config to show the differences from. Defaults
            to the closest packaged one; left out if there is none.
        max_pictures (int): At most so many of the sample hook's pictures, evenly spaced. Defaults
            to 12.
        beside (Sequence[Run]): Other runs, whose metrics and losses are drawn in the same panels.
    """
    parts = [_facts(run), _results(run, beside)]
    for name, panels in group_scalars(run, beside).items():
        figures = ''.join(
            f'<figure>{curves_svg(title, curves)}</figure>' for title, curves in panels.items()
        )
        parts.append(
            f'<h3>{name}</h3>{_throughput(run) if name == "Throughput" else ""}<div'
            f' class="grid">{figures}</div>'
        )
    parts += [
        _samples(run, max_pictures),
        _config(run.cfg, base or closest_packaged_config(run.cfg)),
        _environment(run),
    ]
    return ''.join(parts)


def _facts(run: Run) -> str:
    network = run.cfg.model.network.type
    rows = [
        ('model', f'{run.cfg.model.type} of {network}'),
        ('iterations', f'{run.last_iteration} of {run.cfg.train_cfg.max_iters}'),
        (
            'starts',
            ', '.join(
                f'{stamp} (resumed at {start})' if start else stamp for stamp, start in run.starts
            ),
        ),
    ]
    teacher = (run.cfg.model.get('teacher') or {}).get('checkpoint')
    rows += [('teacher', f'`{teacher}`')] if teacher else []
    return table((), [*rows, ('work dir', f'`{run.work_dir}`')])


def _results(run: Run, beside: Sequence[Run]) -> str:
    rows = []
    for name in run.metrics:
        series = run.scalars[name]
        sampling = run.cfg.evaluations[name.split('/')[0]].sampling
        last = max(series)
        lowest, highest = (choose(series, key=series.get) for choose in (min, max))
        rows.append(
            [
                name,
                sampling.network,
                str(sampling.get('nfe', 1)),
                f'{series[last]:.4f} at {last}',
                f'{series[lowest]:.4f} at {lowest}',
                f'{series[highest]:.4f} at {highest}',
            ]
        )
    parts = []
    if rows:
        parts += [
            '<h3>Measured during training</h3>',
            table(['metric', 'network', 'NFE', 'last, at iteration', 'lowest', 'highest'], rows),
        ]
    if run.tables:
        parts += [
            '<h3>Measured by tools/test.py</h3>',
            _measured(run.tables),
            '<div class="grid">',
            *(
                f'<figure>{curves_svg(title, curves)}</figure>'
                for title, curves in over_nfe(run, beside).items()
            ),
            *(picture(path, f'test/{osp.basename(path)}') for path in run.plots),
            '</div>',
        ]
    return ''.join(parts)


def _throughput(run: Run) -> str:
    def median(name: str) -> str:
        return f'{statistics.median(run.scalars[name].values()):.4g}'

    rows = [
        [what, median(name)]
        for what, name in (
            ('samples per second, of the last network of a cycle', 'samples_per_second'),
            ('seconds per iteration', 'time'),
            ('of these, waiting for data', 'data_time'),
            ('of these, loading data and generating samples', 'prepare_time'),
        )
        if name in run.scalars
    ]
    shares = [name for name in run.scalars if name.endswith('/time_share')]
    rows += [
        [f'share of the time in phase {name.split("/")[0]}', median(name)]
        for name in shares
        if len(shares) > 1
    ]
    if 'memory' in run.scalars:
        rows.append(['GPU memory, peak, MB', f'{max(run.scalars["memory"].values()):.0f}'])
    return table(['', 'median of the logged values'], rows)


def _samples(run: Run, limit: int) -> str:
    parts = []
    if samples := run.pictures.get('samples'):
        steps = list(samples)
        count = min(limit, len(steps))
        shown = (
            [steps[-1]]
            if count == 1
            else [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
        )
        parts += [
            '<h3>Samples from fixed seeds</h3>',
            f'<p>{count} of {len(steps)} pictures.</p>' if count < len(steps) else '',
            '<div class="grid wide">',
            *(picture(samples[step], f'iteration {step}') for step in shown),
            '</div>',
        ]
    if others := {name: series for name, series in run.pictures.items() if name != 'samples'}:
        last = {name: max(series) for name, series in others.items()}
        parts += [
            '<h3>Pictures of evaluations</h3><div class="grid wide">',
            *(
                picture(others[name][step], f'{name}, iteration {step}')
                for name, step in last.items()
            ),
            '</div>',
        ]
    return ''.join(parts)


def _config(cfg: Config, base: tuple[str, Config] | None) -> str:
    whole = (
        '<details><summary>The whole'
        f' config</summary><pre>{escape(cfg.pretty_text)}</pre></details>'
    )
    if base is None:
        return f'<h3>Config</h3>{whole}'
    rows = [
        [f'`{key}`', *('not set' if value is None else f'`{value}`' for value in values)]
        for key, *values in config_difference(cfg, base[1])
    ]
    difference = table(['key', base[0], 'this run'], rows) if rows else '<p>No difference.</p>'
    return f'<h3>Config, beside {escape(base[0])}</h3>{difference}{whole}'


def _environment(run: Run) -> str:
    rows = [[name, value] for name, value in run.environment.items()]
    return f'<h3>Environment of the last start</h3>{table((), rows)}' if rows else ''


def _measured(tables: dict) -> str:
    rows = [
        [metric, network, nfe, f'{value:.4f}']
        for metric, networks in tables.items()
        for network, values in networks.items()
        for nfe, value in values.items()
    ]
    return table(['metric', 'network', 'NFE', 'value'], rows)


def quickstart_section(folder: str, tables: dict, seconds: dict[str, float]) -> str:
    """What ``tools/quickstart.sh`` measured and drew."""
    # a plot of two points says no more than the table
    plots = [
        f'{metric.replace("/", "_")}_vs_nfe.png'
        for metric, networks in tables.items()
        if any(len(values) > 2 for values in networks.values())
    ]
    figures = ''.join(
        picture(osp.join(folder, name), caption)
        for name, caption in (
            ('samples.png', 'Real ones, teacher and generator from the same seeds'),
            *((osp.join('test', name), name) for name in plots),
        )
        if osp.isfile(osp.join(folder, name))
    )
    took = ', '.join(f'{escape(stage)} {value:.0f} s' for stage, value in seconds.items())
    return f'{_measured(tables)}<p>Training took: {took}.</p><div class="grid wide">{figures}</div>'
