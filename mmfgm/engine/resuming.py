# Copyright (c) mmfgm authors.
"""What a resumed run may change: its config against that of the run that wrote the checkpoint."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mmfgm.config import leaves

APPLIED, WARNED, REFUSED, IGNORED = 'applied', 'warned', 'refused', 'ignored'
# The first pattern that fits decides. The last one fits keys that do not touch the training.
RULES = (
    ('model.teacher.fp8', REFUSED),
    # the content is compared, not its place: fingerprints of pre-trained weights
    ('model.teacher.*', IGNORED),
    # only for pictures
    ('model.decoder*', IGNORED),
    # a resumed run with another seed has a message of its own
    ('randomness.seed', IGNORED),
    # moved files are the rule rather than the exception; other content cannot be told from them
    ('*.path', WARNED),
    ('*.data_root', WARNED),
    ('*.pretrained', WARNED),
    # memory against time, up to rounding
    ('*.checkpointing', WARNED),
    ('optim_wrapper.constructor', REFUSED),
    ('optim_wrapper.*.type', REFUSED),
    ('optim_wrapper.*', APPLIED),
    ('param_scheduler*', APPLIED),
    ('train_cfg.max_iters', WARNED),
    ('train_cfg.*', REFUSED),
    ('train_dataloader.batch_size', REFUSED),
    ('train_dataloader.drop_last', REFUSED),
    ('train_dataloader.collate_fn*', REFUSED),
    ('train_dataloader.sampler*', REFUSED),
    ('train_dataloader.dataset*', REFUSED),
    ('model.*', REFUSED),
    ('default_hooks.ema*', WARNED),
    ('custom_hooks*', WARNED),
    ('strategy.*', WARNED),
    ('randomness.*', WARNED),
    ('auto_scale_lr*', WARNED),
    ('*', IGNORED),
)
# what leaving a key out means
DEFAULTS = {
    'train_cfg.accumulation': 1,
    'train_cfg.share_samples': False,
    'train_cfg.share_velocity': False,
    'strategy.precision': 'fp32',
    'model.teacher.fp8': False,
}


@dataclass(frozen=True)
class Change:
    """One value that differs.

    Args:
        name (str): Its keys, joined by dots.
        old (Any), new (Any): Values; None where there is none.
        rule (str): What becomes of it: ``'applied'``, ``'warned'`` or ``'refused'``.
    """

    name: str
    old: Any
    new: Any
    rule: str

    def __str__(self) -> str:
        return f'{self.name}: {str(self.old)[:80]} -> {str(self.new)[:80]}'


# together with the number of processes they make the batch of an update
BATCH = ('train_dataloader.batch_size', 'train_cfg.accumulation')


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], processes: tuple[int, int] = (1, 1)
) -> Iterator[Change]:
    """The changes between two resolved configs that touch the training.

    Args:
        old (Mapping), new (Mapping): The configs.
        processes (tuple[int, int]): How many trained with each. Where an update has as many samples
            as before, other parts of that product are no other run.
    """
    before, after = ({**DEFAULTS, **dict(leaves(dict(side), ''))} for side in (old, new))
    samples = [
        math.prod(value if isinstance(value := side.get(name), int) else 0 for name in BATCH) * n
        for side, n in zip((before, after), processes)
    ]
    for name in dict.fromkeys([*before, *after]):
        values = [
            side.get(name, 1 if fnmatchcase(name, 'train_cfg.*_updates') else None)
            for side in (before, after)
        ]
        rule = next(rule for pattern, rule in RULES if fnmatchcase(name, pattern))
        if name in BATCH and samples[0] == samples[1] > 0:
            rule = WARNED
        if values[0] != values[1] and rule is not IGNORED:
            yield Change(name, values[0], values[1], rule)


def settings(optim_wrapper: Mapping[str, Any]) -> dict[str, list[dict]]:
    """Learning rates and all else that an optimizer keeps for each group, by network."""
    return {
        name: [
            {key: value for key, value in group.items() if key != 'params'}
            for group in wrapper.optimizer.param_groups
        ]
        for name, wrapper in optim_wrapper.items()
    }


def reschedule(
    optim_wrapper: Mapping[str, Any],
    schedulers: Mapping[str, list] | list | None,
    fresh: Mapping[str, list[dict]],
    iteration: int,
) -> None:
    """Give optimizers the settings of the config and bring schedulers to an iteration, step by
    step, as if the run had begun with them: each schedule has a recursion of its own.

    Args:
        optim_wrapper: With the states of a checkpoint.
        schedulers: As built from the config, at their beginning.
        fresh: :func:`settings` from before the states were loaded.
        iteration (int): Where the run goes on.
    """
    for name, wrapper in optim_wrapper.items():
        for group, own in zip(wrapper.optimizer.param_groups, fresh[name], strict=True):
            group.update(own)
    lists: Iterable[list] = (
        schedulers.values() if isinstance(schedulers, Mapping) else [schedulers or []]
    )
    with warnings.catch_warnings():
        # that a scheduler steps before its optimizer did
        warnings.simplefilter('ignore')
        for several in lists:
            for _ in range(iteration):
                for scheduler in several:
                    if not scheduler.by_epoch:
                        scheduler.step()
