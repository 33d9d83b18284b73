# Copyright (c) mmfgm authors.
"""Nothing in a work dir, or out of it, is deleted but what the hook itself wrote there."""

from types import SimpleNamespace
from unittest import mock

import pytest
from mmengine.logging import MessageHub

from mmfgm.engine import CheckpointHook
from mmfgm.engine.checkpoint import CheckpointMixin


@pytest.fixture
def runner(tmp_path):
    work_dir = tmp_path / 'run'
    work_dir.mkdir()
    return SimpleNamespace(
        work_dir=str(work_dir),
        message_hub=MessageHub(str(tmp_path)),
        logger=mock.Mock(),
        iter=3,
        epoch=0,
        strategy=CheckpointMixin(),
        save_checkpoint=lambda out_dir, name, **_: (work_dir / name).write_text('weights'),
    )


@pytest.fixture
def hook(runner):
    hook = CheckpointHook(interval=1, max_keep_ckpts=1, save_best='fd/fd', rule='less')
    hook.last_ckpt = None
    return hook


def evaluate(hook, runner, iteration, value):
    runner.iter = iteration - 1
    hook.after_evaluation(runner, {'fd/fd': value})


def test_a_better_checkpoint_takes_the_place_of_ours(hook, runner, tmp_path):
    hook.before_train(runner)
    evaluate(hook, runner, 4, 2.0)
    evaluate(hook, runner, 5, 3.0)
    evaluate(hook, runner, 6, 1.0)
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['best_fd_fd_iter_6.pth']


@pytest.mark.parametrize(
    'name', ['elsewhere/best_fd_fd_iter_4.pth', 'run/notes.pth', 'run/iter_4.pth', 'run/best_other']
)
def test_a_path_in_a_checkpoint_is_not_obeyed(hook, runner, tmp_path, name):
    """A copied work dir says where the original's best checkpoint lies, and a file from a stranger
    may say anything."""
    victim = tmp_path / name
    victim.parent.mkdir(exist_ok=True)
    victim.write_text('not to be deleted')
    hook.before_train(runner)
    runner.message_hub.update_info('best_score_fd/fd', 2.0)
    runner.message_hub.update_info('best_ckpt_fd/fd', str(victim))
    evaluate(hook, runner, 6, 1.0)
    assert victim.exists() and (tmp_path / 'run' / 'best_fd_fd_iter_6.pth').exists()


def test_a_copied_work_dir_drops_its_own_best(hook, runner, tmp_path):
    copy = tmp_path / 'run' / 'best_fd_fd_iter_4.pth'
    copy.write_text('the copy')
    hook.before_train(runner)
    runner.message_hub.update_info('best_score_fd/fd', 2.0)
    runner.message_hub.update_info('best_ckpt_fd/fd', '/original/best_fd_fd_iter_4.pth')
    evaluate(hook, runner, 6, 1.0)
    assert not copy.exists()


def test_outdated_steps_are_numbers(hook, runner, tmp_path):
    victim = tmp_path / 'victim.pth'
    victim.write_text('not to be deleted')
    runner.message_hub.update_info('keep_ckpt_ids', ['x/../../victim', 4])
    (tmp_path / 'run' / 'iter_4.pth').write_text('weights')
    hook.before_train(runner)
    hook._save_checkpoint_with_step(runner, 5, {})
    assert victim.exists() and not (tmp_path / 'run' / 'iter_4.pth').exists()


def test_only_left_overs_of_ours_are_removed(hook, runner, tmp_path):
    ours = [
        f'iter_4.pth.{"0a" * 16}.tmp',
        'iter_4.pth.tmp',
        'iter_4.pth.old.tmp',
        f'best_fd_fd_iter_4.pth.{"0a" * 16}.tmp',
        f'last_checkpoint.{"0a" * 16}.tmp',
    ]
    foreign = ['download.tmp', 'iter_4.pth.mine.tmp', 'notes.iter_4.pth.tmp', 'iter_4.pth']
    for name in (*ours, *foreign):
        (tmp_path / 'run' / name).write_text('x')
    hook.before_train(runner)
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == sorted(foreign)
