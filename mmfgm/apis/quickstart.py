# Copyright (c) mmfgm authors.
"""A problem from its data to a one-step generator that is measured, pictured and exported. Run
again, it reuses what is finished."""

import json
import os
import os.path as osp
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

import mmfgm
from mmfgm.config import resolve
from mmfgm.datasets import Digits, render
from mmfgm.errors import UsageError
from mmfgm.evaluation import draw_captioned, draw_panels
from mmfgm.files import read_json, write_file
from mmfgm.models import Sampling, latest_checkpoint, read_pickle
from mmfgm.registry import DATASETS

from .config import read_config
from .export import export_generator
from .report import write_report
from .runs import is_work_dir
from .testing import Table, build_for_sampling, measure
from .training import train

# of each class of digits, and of captions of shapes, two of each kind
PICTURES_PER_CLASS = 8
CAPTIONS = 12

Sampler = Callable[[dict, Sampling], torch.Tensor]


def _config_path(name: str) -> str:
    return osp.join(osp.dirname(mmfgm.__file__), '.mim', 'configs', name)


def fresh_unless_same(folder: str, request: dict) -> bool:
    """Empty ``folder`` unless it was made for the same ``request``, which is kept in it; True if it
    was.

    Raises:
        UsageError: If the folder holds something and no ``request.json``: it is somebody else's.
    """
    note = osp.join(folder, 'request.json')
    if osp.isfile(note):
        try:
            same = read_json(note, 'start afresh') == request
        except UsageError:
            same = False
        if same:
            return True
    elif osp.islink(folder) or (
        osp.exists(folder) and (not osp.isdir(folder) or os.listdir(folder))
    ):
        raise UsageError(
            f'{folder!r} exists and holds no request.json, so the quickstart did not make it and'
            ' does not delete it; name another --work-dir'
        )
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    write_file(note, json.dumps(request))
    return False


def train_stage(
    config: str, work_dir: str, iters: int | None, options: dict[str, Any], inputs: str = ''
) -> dict:
    """Train one config to the end, or go on from where it stopped.

    Returns:
        dict: ``checkpoint``, whether anything was left to be ``trained``, ``seconds`` it took in
            all, and ``made_from``: what a later stage depends on.
    """
    cfg = read_config(config)
    options = {**options, 'train_cfg.max_iters': iters or cfg.train_cfg.max_iters}
    # another schedule or another teacher is another run: resuming would mix the two
    fresh_unless_same(work_dir, dict(config=cfg.pretty_text, options=options, inputs=inputs))
    checkpoint = latest_checkpoint(work_dir)
    finished = f'iter_{options["train_cfg.max_iters"]}.pth'
    trained = checkpoint is None or osp.basename(checkpoint) != finished
    if trained:
        cfg.merge_from_dict({**options, 'launcher': 'none', 'work_dir': work_dir})
        train(cfg, 'auto')
        checkpoint = latest_checkpoint(work_dir)
    else:
        print(f'{work_dir}: finished already, reusing {osp.basename(checkpoint)}')
    content = read_pickle(checkpoint)
    return dict(
        checkpoint=checkpoint,
        trained=trained,
        seconds=content['message_hub']['runtime_info']['train_seconds'],
        made_from=f'{osp.basename(checkpoint)} of {content["meta"]["time"]}',
    )


def digits_picture(cfg: Config, sample: Sampler, samplings: dict[str, Sampling]) -> np.ndarray:
    """Eight of each class: real ones, and each sampling of the same noise."""
    digits = Digits()
    real = torch.cat(
        [digits.x_0[digits.cond['labels'] == c][:PICTURES_PER_CLASS] for c in range(10)]
    )
    labels = torch.arange(10).repeat_interleave(PICTURES_PER_CLASS)
    numbers = torch.arange(len(labels))
    batch = dict(idx=numbers, seed=numbers, cond=dict(labels=labels))
    panels = {title: sample(batch, sampling) for title, sampling in samplings.items()}
    return draw_panels({'real digits': real, **panels}, nrow=PICTURES_PER_CLASS)


def shapes_picture(cfg: Config, sample: Sampler, samplings: dict[str, Sampling]) -> np.ndarray:
    """Captions of every kind below a rendering of each, and below what each sampling makes."""
    prompts = DATASETS.build(cfg.evaluations.shapes.dataset)
    indices = list(range(CAPTIONS))
    captions = [prompts.caption(i) for i in indices]
    scenes = [prompts.scene(i)[1] for i in indices]
    real = render(scenes, cfg.model.network.latent_size) / 127.5 - 1
    batch = prompts.__getitems__(indices)
    panels = {title: sample(batch, sampling) for title, sampling in samplings.items()}
    return draw_captioned(
        {title: (images, captions) for title, images in dict(real=real, **panels).items()}
    )


@dataclass(frozen=True)
class Problem:
    """What a quickstart trains, measures and shows.

    Args:
        config (str): Of the distillation, under ``configs``.
        evaluation (str): Which of its evaluations is run.
        metric (str): The value that generator and teacher are compared by.
        picture (Callable): Draws the real thing beside samples, from the config, what samples a
            batch, and a sampling for each title.
        teacher (str, optional): Config of the teacher's training. Defaults to none: the teacher
            is released with mmfgm.
        nfe (tuple[int]): Of the teacher. Defaults to 50 calls.
    """

    config: str
    evaluation: str
    metric: str
    picture: Callable[[Config, Sampler, dict[str, Sampling]], np.ndarray]
    teacher: str | None = None
    nfe: tuple[int, ...] = (50,)


PROBLEMS = dict(
    digits=Problem(
        'fgm/digits_shared.py', 'fd', 'fd/fd', digits_picture, 'reflow/digits.py', (1, 10, 50, 100)
    ),
    shapes=Problem('fgm/shapes_small.py', 'shapes', 'shapes/score_overall', shapes_picture),
)


def run_quickstart(
    name: str = 'digits',
    folder: str | None = None,
    pretrain_iters: int | None = None,
    distill_iters: int | None = None,
    num_samples: int | None = None,
) -> dict[str, dict]:
    """Run all stages; prints the table and returns the content of ``metrics.json``.

    Args:
        name (str): One of ``PROBLEMS``. Defaults to ``'digits'``.
        folder (str, optional): Gets the runs, ``metrics.json``, the pictures, the report and the
            export. Defaults to ``work_dirs/quickstart`` and the name.
        pretrain_iters (int, optional), distill_iters (int, optional), num_samples (int, optional):
            Default to the configs'.

    Returns:
        dict: ``metrics`` (metric -> network -> NFE -> value) and ``seconds`` of each training.

    Raises:
        UsageError: If there is no such problem, or iterations are given for a teacher that is not
            trained here.
    """
    if name not in PROBLEMS:
        raise UsageError(f'there is no quickstart {name!r}; choose from {list(PROBLEMS)}')
    problem = PROBLEMS[name]
    folder = folder or osp.join('work_dirs', 'quickstart', name)
    config = _config_path(problem.config)
    seconds: dict[str, float] = {}
    options: dict[str, Any] = {}
    inputs = ''
    if problem.teacher:
        teacher_dir = osp.join(folder, 'teacher')
        # the teacher is measured once, at the end
        pretrain = train_stage(
            _config_path(problem.teacher),
            teacher_dir,
            pretrain_iters,
            {f'evaluations.{problem.evaluation}.interval': 0},
        )
        seconds['pretrain'] = pretrain['seconds']
        options, inputs = {'model.teacher.checkpoint': teacher_dir}, pretrain['made_from']
    elif pretrain_iters:
        raise UsageError(
            f'the teacher of {name} is released with mmfgm and not trained here; leave'
            ' --pretrain-iters out'
        )
    distill = train_stage(config, osp.join(folder, 'fgm'), distill_iters, options, inputs)
    seconds['distill'] = distill['seconds']

    result = osp.join(folder, 'metrics.json')
    request = dict(made_from=distill['made_from'], num_samples=num_samples)
    if not (fresh_unless_same(osp.join(folder, 'test'), request) and osp.isfile(result)):
        if num_samples:
            options[f'evaluations.{problem.evaluation}.dataset.num_samples'] = num_samples
        table = _measure(problem, config, options, folder, distill['checkpoint'])
        write_file(result, json.dumps(dict(metrics=table, seconds=seconds), indent=2) + '\n')
        # a run of less than one line of log has no curves
        if is_work_dir(osp.join(folder, 'fgm')):
            write_report(folder, curves=osp.join(folder, 'curves.png'))
    content = read_json(result, 'delete it and start again', dict)
    _say(problem, content, folder)
    return content


def _measure(
    problem: Problem, config: str, options: dict[str, Any], folder: str, checkpoint: str
) -> Table:
    """Teacher and generator by the config's evaluation, their picture, and the export."""

    def read() -> Config:
        named = {'work_dir': osp.join(folder, 'fgm'), 'launcher': 'none', **options}
        return resolve(read_config(config, named))

    networks = ['teacher', 'generator_ema']
    shown = [Sampling(**entry) for entry in read().default_hooks.samples.samplings.values()]
    guidance = next(sampling.guidance for sampling in shown if sampling.network == 'teacher')
    table = measure(
        read(),
        checkpoint,
        networks,
        problem.nfe,
        guidance=guidance,
        evaluation=[problem.evaluation],
        out=osp.join(folder, 'test'),
    )
    cfg = read()
    cfg.work_dir = osp.join(folder, 'test')
    model = build_for_sampling(cfg, networks, checkpoint).model
    samplings = {
        f'{sampling.network.removesuffix("_ema")}, {sampling.nfe} NFE': sampling
        for sampling in shown
    }
    picture = problem.picture(read(), model.sample, samplings)
    Image.fromarray(picture).save(osp.join(folder, 'samples.png'))
    export_generator(read(), checkpoint, osp.join(folder, 'export'), force=True)
    return table


def _say(problem: Problem, content: dict[str, dict], folder: str) -> None:
    """Print what was measured and where it lies."""
    values = content['metrics'][problem.metric]
    ratio = values['generator_ema']['1'] / values['teacher']['50']
    print(
        f'One call of the generator: {ratio:.2f} times the {problem.metric} of 50 calls of the'
        ' teacher.'
    )
    for stage, seconds in content['seconds'].items():
        print(f'{stage}: {seconds:.0f} s of training')
    print(
        f'Look at {folder}/samples.png, {folder}/curves.png and {folder}/report.html; the numbers'
        f' are in {folder}/metrics.json, plots over NFE in {folder}/test, and the generator to give'
        f' away in {folder}/export.'
    )
