# Copyright (c) mmfgm authors.
import os.path as osp

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook

from mmfgm.errors import Interrupted, UsageError
from mmfgm.evaluation import build_evaluations, draw_panels
from mmfgm.models import Sampling
from mmfgm.registry import DATASETS, HOOKS

from .checkpoint import CheckpointHook
from .preemption import PreemptionHook
from .rng import preserve_rng


@HOOKS.register_module()
class EvaluationHook(Hook):
    """Run the config's ``evaluations`` during training, each at its own interval.

    An evaluation comes after a checkpoint of the same iteration, so a crash in a long one, or a
    SIGTERM, for which it stops between two batches, loses nothing: a run that resumes from there
    evaluates first.
    Results go to the log, to the visualizer as ``NAME/METRIC``, and to the hooks'
    ``after_evaluation``; what metrics write goes to ``WORK_DIR/NAME/iter_N``, their pictures to the
    visualizer.
    """

    priority = 'LOWEST'

    def before_run(self, runner):
        # built before training, so that a mistake in a config shows at once
        self.evaluations = build_evaluations(runner.cfg.get('evaluations'))
        for evaluation in self.evaluations.values():
            runner.model.check(Sampling(**evaluation.sampling))
        known = [
            name for evaluation in self.evaluations.values() for name in evaluation.value_names
        ]
        for hook in runner.hooks:
            for key in (hook.save_best or []) if isinstance(hook, CheckpointHook) else []:
                if key not in known:
                    raise UsageError(
                        f'default_hooks.checkpoint.save_best names {key!r}, but the evaluations'
                        f' measure {known}; name one of these'
                    )

    def _due(self, iteration: int) -> list[str]:
        return [
            name
            for name, e in self.evaluations.items()
            if e.interval and iteration % e.interval == 0
        ]

    def before_train(self, runner):
        if runner.iter > 0:
            # stand where after_train_iter of that iteration stood: MMEngine's names and metas count
            # from there
            runner.train_loop._iter -= 1
            self._run(runner, self._due(runner.iter + 1))
            runner.train_loop._iter += 1

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        due = self._due(runner.iter + 1)
        for hook in runner.hooks if due else []:
            if isinstance(hook, CheckpointHook):
                hook.save_now(runner)
        self._run(runner, due)

    def _run(self, runner, names) -> None:
        preemption = next((h for h in runner.hooks if isinstance(h, PreemptionHook)), None)
        metrics: dict[str, float] = {}
        for name in names:
            evaluation = self.evaluations[name]
            try:
                with preserve_rng():
                    values = evaluation.run(
                        runner.model,
                        out_dir=osp.join(runner.work_dir, name, f'iter_{runner.iter + 1}'),
                        config=dict(
                            model=runner.cfg.model,
                            precision=getattr(runner.strategy, 'precision', None),
                        ),
                        stop=preemption and preemption.signals.agreed,
                    )
            except Interrupted as e:
                preemption.leave(
                    runner,
                    f'{preemption.signals.name}: {e}, after iteration {runner.iter + 1}, of which'
                    ' there is a checkpoint; --resume takes it up again',
                )
            for title, picture in evaluation.pictures().items():
                runner.visualizer.add_image(title, picture, step=runner.iter + 1)
            # one process's numbers for all, so that all keep or drop a best checkpoint alike
            shared = [{key: float(value) for key, value in values.items()}]
            broadcast_object_list(shared)
            metrics.update(shared[0])
        if not metrics:
            return
        line = '  '.join(f'{key}: {value:.4f}' for key, value in metrics.items())
        runner.logger.info(f'Evaluation at iteration {runner.iter + 1}:  {line}')
        for key, value in metrics.items():
            runner.message_hub.update_scalar(f'val/{key}', value)
        runner.visualizer.add_scalars(metrics, step=runner.iter + 1)
        runner.call_hook('after_evaluation', metrics=metrics)


@HOOKS.register_module()
class SampleHook(Hook):
    """Draw samples from fixed seeds, several samplings side by side, at an interval and at the end.

    The picture is saved by the visualizer:
        ``WORK_DIR/TIMESTAMP/vis_data/vis_image/samples_ITER.png``.

    Args:
        interval (int): Iterations between pictures.
        dataset (dict): Config of the items to generate.
        samplings (dict[str, dict]): Title to arguments of :class:`~mmfgm.models.Sampling`.
        nrow (int): Images in a row. Defaults to 10.
    """

    priority = 'LOWEST'

    def __init__(self, interval: int, dataset: dict, samplings: dict[str, dict], nrow: int = 10):
        self.interval = interval
        self.samplings = {title: Sampling(**cfg) for title, cfg in samplings.items()}
        self.nrow = nrow
        dataset = DATASETS.build(dataset)
        self.batch = dataset.__getitems__(range(len(dataset)))
        self._fixed: dict | None = None

    def before_run(self, runner):
        for sampling in self.samplings.values():
            runner.model.check(sampling)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not (
            self.every_n_train_iters(runner, self.interval) or runner.iter + 1 == runner.max_iters
        ):
            return
        if self._fixed is None:
            # a pre-trained network never changes, so its samples are drawn once
            self._fixed = {
                title: runner.model.sample(self.batch, sampling).cpu()
                for title, sampling in self.samplings.items()
                if sampling.network in runner.model.pretrained
            }
        panels = {}
        for title, sampling in self.samplings.items():
            panels[title] = (
                self._fixed[title]
                if title in self._fixed
                else runner.model.sample(self.batch, sampling)
            )
        if is_main_process():
            runner.visualizer.add_image(
                'samples', draw_panels(panels, self.nrow), step=runner.iter + 1
            )
