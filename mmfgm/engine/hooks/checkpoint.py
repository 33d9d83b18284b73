# Copyright (c) mmfgm authors.
import os
import os.path as osp
import re
import shutil
from collections import deque
from functools import partial

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook as _CheckpointHook

from mmfgm.files import write_file
from mmfgm.registry import HOOKS

# What this hook writes into the work dir, and what is left of it by a crash. Nothing else there is
# ever deleted, whatever a checkpoint says: it may have been copied from another work dir, or come
# from somebody else.
_CHECKPOINT = r'(best_[^/]+_)?iter_\d+\.pth'
_LEFT_OVER = rf'({_CHECKPOINT}|last_checkpoint)(\.[0-9a-f]{{32}})?(\.old)?\.tmp'


def _remove(path: str) -> None:
    if osp.isdir(path):
        shutil.rmtree(path)
    elif osp.exists(path):
        os.remove(path)


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """MMEngine's hook, made safe against a crash at any moment.

    An old checkpoint is deleted only after the new one is complete, and ``last_checkpoint`` always
    names a complete one. They go to the work dir.

    Args:
        interval (int): Iterations between checkpoints; -1 for the last only. Defaults to -1.
        max_keep_ckpts (int): Newest checkpoints to keep; -1 for all. Defaults to 3.
        save_best (str or list[str], optional): Metrics of the evaluation hook, as ``NAME/METRIC``,
            whose best checkpoint is kept beside those.
        rule (str or list[str], optional): ``'less'`` or ``'greater'`` is better.
    """

    def __init__(
        self,
        interval: int = -1,
        max_keep_ckpts: int = 3,
        save_best: str | list[str] | None = None,
        rule: str | list[str] | None = None,
    ):
        super().__init__(
            interval, by_epoch=False, max_keep_ckpts=max_keep_ckpts, save_best=save_best, rule=rule
        )

    def before_train(self, runner) -> None:
        self.out_dir = runner.work_dir
        if is_main_process():
            for name in os.listdir(self.out_dir):
                if re.fullmatch(_LEFT_OVER, name):
                    _remove(osp.join(self.out_dir, name))
        kept = runner.message_hub.runtime_info.get('keep_ckpt_ids', [])
        self.keep_ckpt_ids = deque(step for step in kept if type(step) is int)
        runner.logger.info(f'Checkpoints will be saved to {self.out_dir}.')

    def save_now(self, runner) -> None:
        """Save at the end of the current iteration, unless that is done already."""
        if self.last_ckpt != self._path(runner.iter + 1):
            self._save_checkpoint(runner)
        runner.strategy.finish_checkpoint()

    def after_train(self, runner) -> None:
        super().after_train(runner)
        runner.strategy.finish_checkpoint()

    def _path(self, step: int) -> str:
        return osp.join(self.out_dir, self.filename_tmpl.format(step))

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        outdated: list[str] = []
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids.append(step)
            while len(self.keep_ckpt_ids) > self.max_keep_ckpts:
                outdated.append(self._path(self.keep_ckpt_ids.popleft()))
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        path = self._path(step)
        runner.message_hub.update_info('last_ckpt', path)
        runner.save_checkpoint(
            self.out_dir,
            osp.basename(path),
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=False,
        )
        self.last_ckpt = path

        def findable() -> None:
            write_file(osp.join(runner.work_dir, 'last_checkpoint'), path)
            for old in outdated:
                _remove(old)

        # no process goes on, perhaps to its end, before the checkpoint is findable, or being
        # written
        runner.strategy.when_saved(findable)

    def after_evaluation(self, runner, metrics: dict[str, float]) -> None:
        """Keep the best checkpoint so far of each metric in ``save_best`` that was just
        measured."""
        for key, rule in zip(
            self.key_indicators if self.save_best else [], self.rules if self.save_best else []
        ):
            if key not in metrics:
                continue
            best = runner.message_hub.runtime_info.get(
                f'best_score_{key}', self.init_value_map[rule]
            )
            if not self.rule_map[rule](metrics[key], best):
                continue
            step = runner.iter + 1
            prefix = f'best_{key.replace("/", "_")}_'
            path = osp.join(self.out_dir, prefix + self.filename_tmpl.format(step))
            # a path in a checkpoint is obeyed only as far as it is a name of ours in this work dir
            outdated = osp.basename(str(runner.message_hub.runtime_info.get(f'best_ckpt_{key}')))
            runner.message_hub.update_info(f'best_score_{key}', metrics[key])
            runner.message_hub.update_info(f'best_ckpt_{key}', path)
            runner.save_checkpoint(
                self.out_dir,
                osp.basename(path),
                save_optimizer=False,
                save_param_scheduler=False,
                meta=dict(epoch=runner.epoch, iter=step),
                by_epoch=False,
            )
            runner.logger.info(f'Best {key} so far: {metrics[key]:.4f}, saved to {path}')
            ours = re.fullmatch(rf'{re.escape(prefix)}iter_\d+\.pth', outdated)
            if ours and outdated != osp.basename(path):
                runner.strategy.when_saved(partial(_remove, osp.join(self.out_dir, outdated)))
