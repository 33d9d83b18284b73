# Copyright (c) mmfgm authors.
"""Every family's network, sharded over two processes, has the gradients that it has on one."""

import pytest
import torch

from mmfgm.engine import SingleDeviceStrategy
from tests.conftest import run_module
from tests.family_checks import TINY
from tests.sharded_families import gradients


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Of half the batch each, with guidance, GAN and recomputation, in float32."""
    folders = {name: make(tmp_path / name) for name, make in TINY.items()}
    run_module('tests.sharded_families', tmp_path, *folders.values(), nproc=2)
    sharded = torch.load(tmp_path / 'gradients.pth')
    for name, folder in folders.items():
        expected, whole = gradients(folder, SingleDeviceStrategy(work_dir=str(tmp_path)))
        found, part = sharded[folder]
        assert found.keys() == expected.keys(), name
        for where in {network for network, _ in expected}:
            # sums come in another order, so that errors are of the largest gradient's size
            scale = max(g.abs().max() for (network, _), g in expected.items() if network == where)
            assert scale > 0
            errors = {
                key: float((found[network, key] - g).abs().max() / scale)
                for (network, key), g in expected.items()
                if network == where
            }
            worst = max(errors, key=errors.get)
            assert errors[worst] < 1e-5, (name, where, worst, errors[worst])
        # tensors of few rows leave a process a little more than its half
        assert part < 0.65 * whole, (name, part, whole)
