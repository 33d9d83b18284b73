# Copyright (c) mmfgm authors.
r"""A rehearsal against reality: what tools/rehearse.py predicts of a config on one GPU, and what
this machine's GPU takes for it, in a table for docs/scale.md.

Weights are random, batches are zeros, and updates are of one micro-batch; networks, losses,
optimizers, averages and the loop are those of a training. ``--variants`` lists changes of the
config, one row each, several joined by commas; each runs in a process of its own, so that one that
does not fit says so in its row. ``--largest`` doubles the batch until it does not fit.

    python tools/benchmark/reality.py configs/fgm/sd3_512_1xb4.py --gpu H200-141GB --largest \
        --variants default strategy.compile=True model.network.checkpointing=False
    python tools/benchmark/reality.py configs/fgm/sd3_512_lora_1xb4.py --gpu H200-141GB

A rehearsal of a large model takes minutes of a CPU. ``--predictions FILE`` keeps them, and
``--only-predict`` makes them beforehand, on any machine; tools/benchmark/gpu.sh has both calls.
"""

import argparse
import json
import os.path as osp
import subprocess
import sys
import tempfile
import time

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmfgm.apis import read_config
from mmfgm.apis.rehearsal import bare_runner, build_without_weights, feed, gpu_named, rehearse
from mmfgm.errors import UsageError
from mmfgm.files import whole_file
from mmfgm.tools.cli import config_options

OUT_OF_MEMORY = 3
MOST_DOUBLINGS = 4
HEAD = (
    'change',
    'batch',
    'peak GiB: predicted',
    'measured',
    'ratio',
    'seconds an iteration: predicted',
    'measured',
    'ratio',
    'MFU by phase',
)


def configured(args: argparse.Namespace, change: str, batch_size: int | None) -> Config:
    """The config with a change, for one process and one micro-batch an update."""
    options = {} if change == 'default' else config_options(change.split(','))
    cfg = read_config(args.config, options)
    cfg.train_cfg.accumulation = 1
    cfg.train_dataloader.batch_size = batch_size or cfg.train_dataloader.batch_size
    if (cfg.get('strategy') or {}).get('type') not in (None, 'SingleDeviceStrategy'):
        cfg.strategy = {
            'type': 'SingleDeviceStrategy',
            **{key: cfg.strategy[key] for key in ('precision', 'compile') if key in cfg.strategy},
        }
    return cfg


def take(cfg: Config, iterations: int) -> dict:
    """Seconds of an iteration and of its phases, and the peak of memory on a GPU."""
    init_default_scope('mmfgm')
    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    with tempfile.TemporaryDirectory() as work_dir:
        torch.manual_seed(0)
        model = build_without_weights(cfg, device)
        runner = bare_runner(cfg, model, work_dir, 'none')
        runner.prepare()
        feed(runner, cfg)
        loop = runner.train_loop
        loop._iter = loop.max_iters - iterations - 2  # where what begins later is there
        phases: dict[str, float] = {}
        for i in range(iterations + 2):
            if i == 2:  # optimizers have their state, and what is compiled is
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
            loop.run_iter()
            if i >= 2:
                if cuda:
                    torch.cuda.synchronize()
                for name, marks in loop.record.marks.items():
                    took = sum(loop.clock.seconds(*mark) for mark in marks)
                    phases[name] = phases.get(name, 0.0) + took / iterations
        seconds = (time.perf_counter() - start) / iterations
    return dict(
        seconds=seconds,
        phases=phases,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )


def apart(args: argparse.Namespace, change: str, batch_size: int | None) -> dict | None:
    """What :func:`take` found in a process of its own; None if it did not fit."""
    command = [sys.executable, __file__, args.config, '--take', change]
    command += ['--iterations', str(args.iterations)]
    command += ['--batch-size', str(batch_size)] if batch_size else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == OUT_OF_MEMORY:
        return None
    if done.returncode:
        raise SystemExit(f'{change}: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def predict(args: argparse.Namespace, change: str, batch_size: int | None) -> dict:
    """Peak of memory, seconds of an iteration and arithmetic by phase, of a rehearsal now or of one
    that is kept."""
    kept = {}
    if args.predictions and osp.exists(args.predictions):
        with open(args.predictions) as f:
            kept = json.load(f)
    key = f'{args.config} {change} {batch_size} {args.gpu}'
    if key not in kept:
        found = rehearse(configured(args, change, batch_size), 1, args.gpu)
        kept[key] = dict(
            gib=found.peak.peak / 2**30,
            seconds=found.seconds if args.gpu else None,
            tflop={name: cost.tflop for name, cost in found.phases.items()},
        )
        if args.predictions:
            with whole_file(args.predictions) as path, open(path, 'w') as f:
                json.dump(kept, f, indent=1)
    return kept[key]


def row(args: argparse.Namespace, change: str, batch_size: int | None = None) -> tuple[str, ...]:
    """A line of the table."""
    size = str(configured(args, change, batch_size).train_dataloader.batch_size)
    predicted = predict(args, change, batch_size)
    gib, seconds = predicted['gib'], predicted['seconds']
    if args.only_predict:
        return (change, size, f'{gib:.2f}', 'not run', '', f'{seconds or 0:.3f}', 'not run', '', '')
    found = apart(args, change, batch_size)
    if found is None:
        return (change, size, f'{gib:.2f}', 'does not fit', *[''] * 5)
    peak = found['peak_bytes'] and found['peak_bytes'] / 2**30
    sheet = args.gpu and gpu_named(args.gpu)
    mfu = []
    for name, tflop in predicted['tflop'].items() if sheet else ():
        # phases that share a velocity are rehearsed as one
        took = sum(found['phases'][phase] for phase in name.split(' and '))
        mfu.append(f'{name} {tflop / took / sheet.bf16_tflops:.2f}')
    return (
        change,
        size,
        f'{gib:.2f}',
        f'{peak:.2f}' if peak else 'not run',
        f'{gib / peak:.2f}' if peak else '',
        f'{seconds:.3f}' if seconds else '',
        f'{found["seconds"]:.3f}',
        f'{seconds / found["seconds"]:.2f}' if seconds else '',
        ', '.join(mfu),
    )


def show(cells: tuple[str, ...]) -> None:
    print(f'| {" | ".join(cells)} |', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--gpu', help='as tools/rehearse.py takes it')
    parser.add_argument('--variants', nargs='+', default=['default'], metavar='KEY=VALUE,...')
    parser.add_argument('--largest', action='store_true')
    parser.add_argument('--iterations', type=int, default=5)
    parser.add_argument('--batch-size', type=int)
    parser.add_argument('--predictions', metavar='FILE.json')
    parser.add_argument('--only-predict', action='store_true')
    parser.add_argument('--take', metavar='KEY=VALUE,...', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.take:
        try:
            found = take(configured(args, args.take, args.batch_size), args.iterations)
        except torch.cuda.OutOfMemoryError:
            raise SystemExit(OUT_OF_MEMORY) from None
        print(json.dumps(found))
        return
    try:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'
        print(f'{args.config} on {card}, predicted for {args.gpu}, torch {torch.__version__}\n')
        show(HEAD)
        show(('---',) * len(HEAD))
        for change in args.variants:
            show(row(args, change, args.batch_size))
        size = configured(args, args.variants[0], args.batch_size).train_dataloader.batch_size
        for _ in range(MOST_DOUBLINGS if args.largest else 0):
            size *= 2
            cells = row(args, args.variants[0], size)
            show(cells)
            if 'does not fit' in cells:
                break
    except UsageError as e:
        raise SystemExit(f'error: {e}') from e


if __name__ == '__main__':
    main()
