# Copyright (c) mmfgm authors.
"""Pre-train a teacher on scikit-learn's digits, distil it, and measure both. Run again, it reuses
what is finished."""

import json
import os
import os.path as osp
import shutil
from typing import Any

import torch
from PIL import Image

import mmfgm
from mmfgm.datasets import Digits
from mmfgm.errors import UsageError
from mmfgm.evaluation import build_evaluations, draw_over_nfe, draw_panels
from mmfgm.files import read_json, write_file
from mmfgm.models import Sampling, latest_checkpoint, read_pickle

from .config import read_config
from .testing import build_for_sampling, format_table
from .training import train

TEACHER_NFE = (1, 10, 50, 100)
PICTURES_PER_CLASS = 8


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


def run_quickstart(
    folder: str,
    pretrain_iters: int | None = None,
    distill_iters: int | None = None,
    num_samples: int = 10000,
) -> dict[str, dict]:
    """Run all stages; prints the table and returns the content of ``metrics.json``.

    Args:
        folder (str): Gets the runs, ``metrics.json`` and the pictures.
        pretrain_iters (int, optional), distill_iters (int, optional): Default to the configs'.
        num_samples (int): Samples per measurement.
    """
    teacher_dir = osp.join(folder, 'teacher')
    fgm_dir = osp.join(folder, 'fgm')
    teacher = _config_path('reflow/digits.py')
    fgm = _config_path('fgm/digits.py')
    # the teacher is measured once, at the end
    pretrain = train_stage(teacher, teacher_dir, pretrain_iters, {'evaluations.fd.interval': 0})
    distill = train_stage(
        fgm,
        fgm_dir,
        distill_iters,
        {'model.teacher.checkpoint': teacher_dir},
        pretrain['made_from'],
    )

    paths = [osp.join(folder, name) for name in ('metrics.json', 'samples.png', 'fd_vs_nfe.png')]
    request = dict(made_from=distill['made_from'], num_samples=num_samples)
    if fresh_unless_same(osp.join(folder, 'test'), request) and all(map(osp.isfile, paths)):
        metrics = read_json(paths[0], 'delete it and start again', dict)
    else:
        seconds = dict(pretrain=pretrain['seconds'], distill=distill['seconds'])
        metrics = measure(fgm, teacher_dir, folder, num_samples, distill['checkpoint'], seconds)
        write_file(paths[0], json.dumps(metrics, indent=2) + '\n')
    report(metrics, folder)
    return metrics


def measure(
    config: str,
    teacher_dir: str,
    folder: str,
    num_samples: int,
    checkpoint: str,
    seconds: dict[str, float],
) -> dict:
    """Fréchet distances by NFE, and the two pictures."""
    cfg = read_config(
        config,
        {
            'work_dir': osp.join(folder, 'test'),
            'launcher': 'none',
            'model.teacher.checkpoint': teacher_dir,
            'evaluations.fd.dataset.num_samples': num_samples,
        },
    )
    runner = build_for_sampling(cfg, ['teacher', 'generator_ema'], checkpoint)
    evaluation = build_evaluations(cfg.evaluations)['fd']
    metrics: dict[str, dict] = dict(teacher={}, generator={}, seconds=seconds)
    samplings = [Sampling('teacher', nfe) for nfe in TEACHER_NFE] + [Sampling('generator_ema')]
    for sampling in samplings:
        distance = evaluation.run(runner.model, sampling)['fd/fd']
        metrics[sampling.network.removesuffix('_ema')][str(sampling.nfe)] = distance
        runner.logger.info(
            f'{sampling.network} at {sampling.nfe} NFE: Frechet distance {distance:.4f}'
        )

    digits = Digits()
    real = torch.cat(
        [digits.x_0[digits.cond['labels'] == c][:PICTURES_PER_CLASS] for c in range(10)]
    )
    labels = torch.arange(10).repeat_interleave(PICTURES_PER_CLASS)
    numbers = torch.arange(len(labels))
    batch = dict(idx=numbers, seed=numbers, cond=dict(labels=labels))
    panels = {
        'real digits': real,
        'teacher, 50 NFE': runner.model.sample(batch, Sampling('teacher', 50)),
        'generator, 1 NFE': runner.model.sample(batch, Sampling('generator_ema')),
    }
    Image.fromarray(draw_panels(panels, nrow=PICTURES_PER_CLASS)).save(
        osp.join(folder, 'samples.png')
    )
    curves = {
        name: {int(n): value for n, value in metrics[name].items()}
        for name in ('teacher', 'generator')
    }
    Image.fromarray(draw_over_nfe(curves, 'Fréchet distance on pixels')).save(
        osp.join(folder, 'fd_vs_nfe.png')
    )
    return metrics


def report(metrics: dict[str, dict], work_dir: str) -> None:
    """Print what was measured and where it lies."""
    table = {'Frechet distance': {name: metrics[name] for name in ('teacher', 'generator')}}
    print(f'\n{format_table(table)}\n')
    ratio = metrics['generator']['1'] / metrics['teacher']['50']
    seconds = metrics['seconds']
    print(f'One call of the generator: {ratio:.2f} of the distance of 50 calls of the teacher.')
    print(
        f'Training: {seconds["pretrain"]:.0f} s for the teacher, {seconds["distill"]:.0f} s for the'
        ' generator.'
    )
    print(
        f'Look at {work_dir}/samples.png and {work_dir}/fd_vs_nfe.png; the numbers are in'
        f' {work_dir}/metrics.json.'
    )
