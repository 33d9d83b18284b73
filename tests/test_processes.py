# Copyright (c) mmfgm authors.
"""Several processes as one."""

import pytest
import torch
import torch.distributed as dist

from mmfgm import processes
from mmfgm.errors import EXIT_USAGE, UsageError
from mmfgm.processes import Progress, connect, init_processes, local, on_main, rank_and_size


def test_without_a_launcher_there_is_one_process():
    connect('none')
    assert not dist.is_initialized() and rank_and_size() == (0, 1) and on_main(lambda: 3) == 3
    with pytest.raises(UsageError, match='here'):
        on_main(lambda: _raise(UsageError('here')))


def _raise(error):
    raise error


def test_the_error_of_the_first_process_ends_the_others(monkeypatch):
    """They exit with its code and leave the message to it."""
    monkeypatch.setattr(processes, 'rank_and_size', lambda: (1, 2))

    def broadcast(results):
        results[:] = [(None, UsageError('from the first'))]

    monkeypatch.setattr(dist, 'broadcast_object_list', broadcast)
    with pytest.raises(SystemExit) as stop:
        on_main(lambda: _raise(AssertionError('only the first process does this')))
    assert stop.value.code == EXIT_USAGE


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    with pytest.raises(UsageError, match='3 processes .* 2 GPU'):
        init_processes('pytorch')


def test_a_tensor_that_is_not_sharded_is_its_own_part():
    tensor = torch.ones(2)
    assert local(tensor) is tensor


def test_progress_says_how_long_it_takes(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 20.0, 40.0])
    monkeypatch.setattr(processes.time, 'perf_counter', lambda: next(clock))
    progress = Progress(40, 'image')
    progress.step(10)  # after 5 seconds: nothing yet
    assert capsys.readouterr().out == ''
    progress.step(10)
    assert '20 of 40 images, 1.0 images/s, ETA 0:00:20' in capsys.readouterr().out
    progress.step(20)
    assert '40 of 40 images, 1.0 images/s, ETA 0:00:00' in capsys.readouterr().out
