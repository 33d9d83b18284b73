# Copyright (c) mmfgm authors.
"""How long each command takes to say --help, and how much memory: median of five.

With --train, also how long tools/train.py takes until the end of its first iteration on the digits,
beside what it cannot do without: importing torch and MMEngine, and building the run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, 'PYTHONPATH': str(ROOT)}
# Runs in a process of its own, so that the children's peak is that of one command.
CHILD = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
BUILDING = """
import time, torch, mmengine
from mmengine.config import Config
from mmengine.runner import FlexibleRunner
imported = time.perf_counter()
from mmfgm.apis.config import building, read_config
from mmfgm.engine import FlowRunner
cfg = read_config('mmfgm::reflow/digits.py')
cfg.launcher, cfg.work_dir = 'none', WORK_DIR
began = time.perf_counter()
runner = FlowRunner.from_cfg(cfg)
runner.prepare()
print('BUILDING', time.perf_counter() - began)
"""


def measure(command: list[str], repeats: int) -> tuple[float, float]:
    """Median of the seconds, and of the peak of memory in MB."""
    found = []
    for _ in range(repeats):
        out = subprocess.run(
            [sys.executable, '-c', CHILD, *command],
            cwd=ROOT,
            env=ENV,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found.append(tuple(map(float, out.split())))
    seconds, memory = (statistics.median(column) for column in zip(*found))
    return seconds, memory


def measure_training(repeats: int) -> dict[str, float]:
    """Seconds of imports, of building, and until the first iteration of a training has ended."""
    python = [sys.executable, '-c']
    imports = measure([*python, 'import torch, mmengine'], repeats)[0]
    building, first = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            out = subprocess.run(
                [*python, BUILDING.replace('WORK_DIR', repr(folder))],
                cwd=ROOT,
                env=ENV,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        building.append(float(out.rsplit('BUILDING', 1)[1]))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, 'tools/train.py', 'configs/reflow/digits.py']
            command += ['--work-dir', folder, '--cfg-options', 'default_hooks.logger.interval=1']
            start = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for line in process.stdout:
                if b'Iter(train)' in line:
                    first.append(time.perf_counter() - start)
                    break
            process.kill()
            process.communicate()
    return dict(
        imports=imports, building=statistics.median(building), first=statistics.median(first)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=5, help='default: %(default)s')
    parser.add_argument('--train', action='store_true', help='measure a training too')
    args = parser.parse_args()
    print(f'{"command":20}{"--help":>10}{"memory":>12}{"misspelt":>12}')
    for path in sorted((ROOT / 'tools').glob('*.py')):
        seconds, memory = measure([sys.executable, str(path), '--help'], args.repeats)
        wrong, _ = measure([sys.executable, str(path), '--misspelt'], args.repeats)
        print(f'{path.name:20}{seconds:8.2f} s{memory:9.0f} MB{wrong:10.2f} s', flush=True)
    if args.train:
        found = measure_training(args.repeats)
        least = found['imports'] + found['building']
        print(
            f'tools/train.py: first iteration after {found["first"]:.2f} s;'
            f' import torch, mmengine {found["imports"]:.2f} s + building'
            f' {found["building"]:.2f} s = {least:.2f} s; ratio {found["first"] / least:.2f}'
        )


if __name__ == '__main__':
    main()
