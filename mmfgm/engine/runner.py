# Copyright (c) mmfgm authors.
import difflib
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.runner import FlexibleRunner

from mmfgm.config import SHARED_KEYS, parse_dump, resolve
from mmfgm.errors import UsageError
from mmfgm.files import check_work_dir
from mmfgm.models import latest_checkpoint
from mmfgm.registry import RUNNERS, STRATEGIES

from .hooks import PreemptionHook
from .resuming import APPLIED, REFUSED, changes
from .strategies import ProcessGroupStrategy, default_strategy

# top-level keys that FlexibleRunner.from_cfg and our tools read
KNOWN_KEYS = (
    'model',
    'work_dir',
    'experiment_name',
    'train_dataloader',
    'optim_wrapper',
    'param_scheduler',
    'train_cfg',
    'strategy',
    'auto_scale_lr',
    'default_hooks',
    'custom_hooks',
    'load_from',
    'resume',
    'launcher',
    'env_cfg',
    'log_processor',
    'log_level',
    'visualizer',
    'default_scope',
    'randomness',
    'evaluations',
    'text_encoder',
    *SHARED_KEYS,
)
REQUIRED_KEYS = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
UNSUPPORTED_KEYS = dict(
    val_cfg='evaluations',
    val_dataloader='evaluations',
    val_evaluator='evaluations',
    test_cfg='evaluations',
    test_dataloader='evaluations',
    compile='strategy.compile',
    test_evaluator='evaluations',
    data_preprocessor='model.data_preprocessor',
)


def check_config(cfg: Config, required: Sequence[str] = REQUIRED_KEYS) -> None:
    """Catch what MMEngine would ignore in silence.

    Raises:
        UsageError: For a misspelt or unsupported top-level key, a missing section, or no fixed
            seed.
    """
    for key in cfg:
        if cfg[key] is not None and key in UNSUPPORTED_KEYS:
            raise UsageError(
                f'the config sets {key}, which is not used here; use {UNSUPPORTED_KEYS[key]}'
            )
        close = difflib.get_close_matches(key, KNOWN_KEYS, 1, cutoff=0.85)
        if key not in KNOWN_KEYS and close:
            raise UsageError(f'the config has an unknown key {key!r}; did you mean {close[0]!r}?')
    missing = [key for key in required if cfg.get(key) is None]
    if missing:
        raise UsageError(
            f'the config has no {", ".join(missing)}; start from one of ours, for example '
            "_base_ = 'mmfgm::fgm/digits.py'"
        )
    if not isinstance(cfg.get('randomness', {}).get('seed'), int):
        raise UsageError(
            'randomness.seed must be a whole number, so that a resumed run repeats exactly, but is'
            f' {cfg.get("randomness", {}).get("seed")!r}'
        )


@RUNNERS.register_module()
class FlowRunner(FlexibleRunner):
    """FlexibleRunner with our strategies: one device, or DDP per network under a launcher, or what
    the config names.

    Attributes:
        allow_changes (bool): Resume even where the config describes another run than the
            checkpoint's.
    """

    allow_changes = False

    @staticmethod
    def check(cfg: Config) -> None:
        """What can be said about a config before anything is built; makes the work dir.

        Raises:
            UsageError: See :func:`~mmfgm.config.resolve`, :func:`check_config` and
                :func:`check_work_dir`.
        """
        resolve(cfg)
        check_config(cfg, REQUIRED_KEYS if cfg.get('train_cfg') else ('model',))
        check_work_dir(cfg.work_dir)

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'FlowRunner':
        """Check a config (:meth:`check`) and build a runner from it."""
        cls.check(cfg)
        return super().from_cfg(cfg)

    def prepare(self) -> None:
        """Build everything that training needs, load or resume: all that can fail before it
        starts."""
        if self.strategy._prepared:
            return
        loop = self.train_loop
        self.strategy.prepare(
            self.model,
            optim_wrapper=self.optim_wrapper,
            param_scheduler=self.param_schedulers,
            dispatch_kwargs=dict(
                epoch_length=len(loop.dataloader),
                max_epochs=1,
                max_iters=loop.max_iters,
                train_micro_batch_size_per_gpu=loop.dataloader.batch_size,
            ),
        )
        self.model = self.strategy.model
        loop.check_updates()
        self.model.check_data(loop.dataloader.dataset)
        self.optim_wrapper = self.strategy.optim_wrapper
        if self.param_schedulers is not None:
            self.param_schedulers = self.strategy.param_schedulers
        self.load_or_resume()
        self.call_hook('before_run')

    def prepare_to_sample(self, checkpoint: str | None) -> None:
        """Build the model alone, with the weights of ``checkpoint``, or of a work dir's last one,
        if one is given."""
        self.strategy.prepare(self.model)
        self.model = self.strategy.model
        if checkpoint is not None:
            self.strategy.load_checkpoint(latest_checkpoint(checkpoint) or checkpoint)
        self.model.eval()

    def train(self):
        """Train to the end; returns the model."""
        self.prepare()
        try:
            model = self.train_loop.run()
        except Exception:
            # whoever called this goes on, perhaps in a notebook, and has Ctrl-C back
            for hook in self.hooks:
                if isinstance(hook, PreemptionHook):
                    hook.signals.end()
            raise
        self.call_hook('after_run')
        return model

    def build_strategy(self, strategy: dict | None = None, launcher: str = 'none', **kwargs):
        """Fill in the strategy's type when the config leaves it out, and hold it against the
        launcher.

        Raises:
            UsageError: If the strategy needs several processes and there is no launcher, or the
                reverse.
        """
        strategy = dict(strategy or {})
        name = strategy.setdefault('type', default_strategy(launcher)).removeprefix('mmfgm.')
        if name in STRATEGIES:
            # MMEngine looks it up before the default scope exists, and has others of the same names
            strategy['type'] = f'mmfgm.{name}'
            if issubclass(STRATEGIES.get(name), ProcessGroupStrategy) != (launcher != 'none'):
                raise UsageError(
                    f'strategy {name} does not go with --launcher {launcher}: start DDPStrategy and'
                    ' FSDP2Strategy with tools/dist_train.sh or tools/slurm_train.sh,'
                    ' SingleDeviceStrategy without a launcher'
                )
        return super().build_strategy(strategy, launcher=launcher, **kwargs)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """As MMEngine's, but ``default_hooks.NAME=None`` removes any hook, not only MMEngine's
        own."""
        stock = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
        super().register_default_hooks(
            {k: v for k, v in (hooks or {}).items() if v is not None or k in stock}
        )

    def load_or_resume(self):
        """As MMEngine's, but ``--resume`` without a checkpoint starts from the beginning, and says
        so."""
        if self._resume is True and self._load_from is None:
            self._resume = latest_checkpoint(self.work_dir) or False
            if not self._resume:
                self.logger.info(
                    f'Nothing to resume in {self.work_dir}: starting from the beginning.'
                )
        self.strategy.compare_config = self._compare_config
        super().load_or_resume()

    def _compare_config(self, filename: str, meta: dict) -> bool:
        """Hold the config against the one that a checkpoint was written with.

        Returns:
            bool: Whether optimizers and schedules follow the config, as something in it differs
            that concerns them.

        Raises:
            UsageError: Names what would make it another run.
        """
        try:
            old = parse_dump(meta['cfg'])
            new = parse_dump(self.cfg.pretty_text)
        except (KeyError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as e:
            self.logger.warning(
                f'The config of {filename} cannot be compared with this one ({str(e)[:80]}):'
                ' whether this is the same run is not checked, and learning rates are those of the'
                ' checkpoint.'
            )
            return False
        # where a config says 'auto', the hardware decides
        for side, precision in ((old, meta.get('precision')), (new, self.strategy.precision)):
            if precision:
                side['strategy'] = {**(side.get('strategy') or {}), 'precision': precision}
        now = get_world_size()
        found = list(changes(old, new, (meta.get('world_size', now), now)))
        refused = [str(change) for change in found if change.rule == REFUSED]
        if refused and not self.allow_changes:
            raise UsageError(
                f'{filename!r} comes from another run than this config describes'
                f' ({"; ".join(refused)}); set these as they were, start afresh in another work'
                ' dir, or insist with --allow-changes'
            )
        for change in found:
            if change.rule == APPLIED:
                self.logger.warning(f'Changed since the checkpoint, applied: {change}')
            else:
                self.logger.warning(
                    f'Changed since the checkpoint: {change}. The run does not repeat the one that'
                    ' it goes on from.'
                )
        longer = next((c for c in found if c.name == 'train_cfg.max_iters'), None)
        if longer and meta['iter'] >= longer.old and self.param_schedulers:
            self.logger.warning(
                f'The run had finished its {longer.old} iterations, and with them its learning rate'
                f' schedules; these now are those of {longer.new} iterations.'
            )
        return any(change.rule == APPLIED or change is longer for change in found)
