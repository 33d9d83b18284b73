# Copyright (c) mmfgm authors.
"""Read what a training run left in its work dir: scalars, pictures, config, environment."""

import os.path as osp
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import escape as glob_escape
from glob import glob
from typing import Any

from mmengine.config import Config

import mmfgm
from mmfgm.apis.config import read_config, read_dump
from mmfgm.apis.runs import no_work_dir, starts
from mmfgm.errors import UsageError
from mmfgm.files import check_regular, read_json, read_json_lines

Series = dict[int, float]  # iteration -> value

# keys of a config that belong to one start, not to what is trained
NOT_COMPARED = ('work_dir', 'launcher', 'resume', 'load_from', 'experiment_name')
# columns of scalars.json that are no curve of their own
COUNTERS = ('iter', 'step', 'epoch')
MAX_LOG = 1 << 30  # characters of one start's log that are looked at


@dataclass
class Run:
    """A training run: all starts of one work dir, joined.

    Args:
        work_dir (str): Where it lies.
        starts (list[tuple[str, int]]): Timestamp of each start that counts, and the iteration it
            went on from (0: afresh).
        scalars (dict[str, dict[int, float]]): Name to the value at each logged iteration;
            evaluations by ``NAME/METRIC``.
        pictures (dict[str, dict[int, str]]): Name to the picture at each iteration; ``samples`` are
            the sample hook's, others of evaluations.
        cfg (Config): The config of the last start.
        environment (dict[str, str]): What MMEngine wrote about machine and libraries at the last
            start.
        tables (dict): What ``tools/test.py`` measured, ``{metric: {network: {NFE: value}}}``; empty
            if it was not run.
        plots (list[str]): The pictures that ``tools/test.py`` drew, of samples and of evaluations;
            its plots over NFE are in ``tables``.
    """

    work_dir: str
    starts: list[tuple[str, int]]
    scalars: dict[str, Series]
    pictures: dict[str, dict[int, str]]
    cfg: Config
    environment: dict[str, str]
    tables: dict[str, dict[str, dict[str, float]]]
    plots: list[str]

    @property
    def name(self) -> str:
        """The last two parts of the path, for example ``fgm/digits``."""
        return '/'.join(osp.abspath(self.work_dir).split('/')[-2:])

    @property
    def metrics(self) -> list[str]:
        """Names of the scalars that evaluations measured."""
        evaluations = self.cfg.get('evaluations') or {}
        return [name for name in self.scalars if name.split('/')[0] in evaluations]

    @property
    def last_iteration(self) -> int:
        return max(
            step
            for series in [*self.scalars.values(), *self.pictures.values()]
            for step in series  # type: ignore[attr-defined]
        )


def read_run(work_dir: str) -> Run:
    """Read a work dir.

    A start that resumed goes on from its checkpoint: what earlier starts logged after that
        iteration is dropped, because
    it was trained again. One that began afresh replaces all before it.

    Raises:
        UsageError: If the folder is no work dir, nothing was logged yet, or a file in it is broken.
    """
    folders = starts(work_dir)
    if not folders:
        raise UsageError(no_work_dir(work_dir))
    counted: list[tuple[str, int]] = []
    scalars: dict[str, Series] = {}
    pictures: dict[str, dict[int, str]] = {}
    for folder in folders:
        log = _read_log(folder)
        resumed = re.search(r'resumed epoch: \d+, iter: (\d+)', log)
        start = int(resumed.group(1)) if resumed else 0
        counted = [*(counted if start else []), (osp.basename(folder), start)]
        scalars = _up_to(start, scalars)
        pictures = _up_to(start, pictures)
        for values in _read_scalars(osp.join(folder, 'vis_data', 'scalars.json')):
            for name, value in values.items():
                # true and 10**400 are no values of a curve
                if name not in COUNTERS and _is_number(value):
                    scalars.setdefault(name, {})[values['step']] = float(value)
        for path in glob(osp.join(glob_escape(folder), 'vis_data', 'vis_image', '*.png')):
            if named := re.fullmatch(r'(.+)_(\d+)\.png', osp.basename(path)):
                pictures.setdefault(named.group(1), {})[int(named.group(2))] = path
    tested = osp.join(work_dir, 'test', 'metrics.json')
    tables = {}
    if osp.isfile(tested):
        tables = _check_tables(read_json(tested, 'delete it, or measure again', dict), tested)
    return Run(
        work_dir=work_dir,
        starts=counted,
        scalars=_in_order(scalars),
        pictures=_in_order(pictures),
        cfg=read_dump(osp.join(folders[-1], 'vis_data', 'config.py')),
        environment=read_environment(log),
        tables=tables,
        plots=[
            path
            for path in sorted(glob(osp.join(glob_escape(work_dir), 'test', '*.png')))
            if not path.endswith('_vs_nfe.png')
        ],
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)


def read_quickstart(path: str) -> tuple[dict, dict[str, float]]:
    """What a quickstart measured, metric to network to NFE to value, and the seconds of each
    training.

    Raises:
        UsageError: If the file holds something else.
    """
    content = read_json(path, 'run the quickstart again', dict)
    tables, seconds = content.get('metrics'), content.get('seconds')
    if (
        not isinstance(tables, dict)
        or not isinstance(seconds, dict)
        or not all(map(_is_number, seconds.values()))
    ):
        raise UsageError(
            f'{path!r} holds {list(content)}, expected the metrics and seconds of a quickstart; run'
            ' it again'
        )
    return _check_tables(tables, path), seconds


def _check_tables(tables: dict, path: str) -> dict:
    """``{metric: {network: {NFE: value}}}``, as ``tools/test.py`` writes it."""
    for metric, networks in tables.items():
        rows = networks.values() if isinstance(networks, dict) else [None]
        for row in rows:
            if not isinstance(row, dict) or not all(
                nfe.isdecimal() and _is_number(value) for nfe, value in row.items()
            ):
                raise UsageError(
                    f'{path!r} holds {str(networks)[:80]!r} for {metric!r}, expected numbers by'
                    ' network and NFE; delete it, or measure again'
                )
    return tables


def _up_to(start: int, series: dict[str, dict]) -> dict[str, dict]:
    return {
        name: {step: value for step, value in values.items() if step <= start}
        for name, values in series.items()
    }


def _in_order(series: dict[str, dict]) -> dict[str, dict]:
    return {name: dict(sorted(values.items())) for name, values in series.items() if values}


def _read_log(folder: str) -> str:
    text = ''
    for path in sorted(glob(osp.join(glob_escape(folder), '*.log'))):
        check_regular(path)
        with open(path, errors='replace') as f:
            text += f.read(MAX_LOG)
    return text


def _read_scalars(path: str) -> Iterator[dict[str, Any]]:
    for number, values in read_json_lines(path, 'delete that line', torn=True):
        step = values.get('step')
        if type(step) is not int or step < 0:
            raise UsageError(
                f"{path!r}, line {number}: 'step' must be the number of an iteration, but is"
                f' {str(step)[:80]!r}; delete that line'
            )
        yield values


def read_environment(log: str) -> dict[str, str]:
    """The ``name: value`` lines of the last environment block of a log, without torch's compile
    flags."""
    blocks = re.findall(r'^System environment:$(.*?)^-{60}$', log, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r'^    (\w[^:\n]*): (.*)$', blocks[-1], flags=re.MULTILINE) if blocks else []
    return {name: value for name, value in lines if name != 'PyTorch compiling details'}


def flatten(cfg: Any, prefix: str = '') -> dict[str, Any]:
    """A nested config as the dotted keys that ``--cfg-options`` takes; other lists and empty dicts
    are values."""
    if isinstance(cfg, list) and cfg and all(isinstance(entry, dict) for entry in cfg):
        cfg = dict(enumerate(cfg))
    if isinstance(cfg, dict) and cfg:
        return {
            key: value
            for name in cfg
            for key, value in flatten(cfg[name], f'{prefix}.{name}' if prefix else name).items()
        }
    return {prefix: cfg}


def config_difference(cfg: Config, base: Config) -> list[tuple[str, str | None, str | None]]:
    """Dotted key, value in ``base``, value in ``cfg`` of all that differs; None where a side has no
    such key."""
    ours, theirs = (
        flatten({key: value for key, value in side.to_dict().items() if key not in NOT_COMPARED})
        for side in (cfg, base)
    )
    differing = [
        key
        for key in sorted({*ours, *theirs})
        if key not in ours or key not in theirs or ours[key] != theirs[key]
    ]

    def value(side: dict[str, Any], key: str) -> str | None:
        return repr(side[key]) if key in side else None

    return [(key, value(theirs, key), value(ours, key)) for key in differing]


def closest_packaged_config(cfg: Config) -> tuple[str, Config] | None:
    """The packaged config that differs from ``cfg`` in the fewest values: what it was most likely
    made from.

    A dumped config no longer names its ``_base_``, so this is found by comparison.

    Returns:
        tuple[str, Config]: Its name, ``mmfgm::FOLDER/NAME.py``, and the config; None if none can be
        read.
    """
    root = osp.join(osp.dirname(mmfgm.__file__), '.mim', 'configs')
    paths = sorted(glob(osp.join(glob_escape(root), '[!_]*', '*.py')))
    candidates = {}
    for name in (f'mmfgm::{osp.relpath(path, root)}' for path in paths):
        with suppress(
            UsageError
        ):  # one that cannot be read is of no use to compare with, and no fault of the run
            candidates[name] = read_config(name)
    return min(
        candidates.items(), key=lambda entry: len(config_difference(cfg, entry[1])), default=None
    )
