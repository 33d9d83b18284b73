# Copyright (c) mmfgm authors.
"""Exports as whoever gets them opens them: by plain diffusers, in a process that cannot import
mmfgm."""

import subprocess
import sys

import torch

from tests.conftest import LIMIT, tool_env

# begins a script of such a process
BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmfgm', 'mmengine'):
            raise ImportError(f'{name} is blocked')

sys.meta_path.insert(0, Blocker())
"""
SCRIPT = f"""{BLOCKED}
import torch
from diffusers import DiffusionPipeline

job = torch.load(sys.argv[1])
pipe = DiffusionPipeline.from_pretrained(job['base'])
if job['lora']:
    pipe.load_lora_weights(job['lora'])
torch.save([pipe(**call).images for call in job['calls']], sys.argv[2])
"""


def images_without_mmfgm(tmp_path, base, calls, lora=None):
    """Images or latents, for each call of the pipeline in ``base``, whose class its folder names,
    by the arguments of the call."""
    torch.save(dict(base=base, lora=lora, calls=calls), tmp_path / 'job')
    env = {key: value for key, value in tool_env().items() if key != 'PYTHONPATH'}
    result = subprocess.run(
        [sys.executable, '-I', '-c', SCRIPT, tmp_path / 'job', tmp_path / 'images'],
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(tmp_path / 'images')
