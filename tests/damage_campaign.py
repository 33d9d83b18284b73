# Copyright (c) mmfgm authors.
"""Damage files of every kind at random, and count: ``python -m tests.damage_campaign``.

It stands with the tests because it damages what they make, while ``tools/torture.py`` is for a
user's own run. The exit code is 1 if anything was silently wrong.
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from .damage import DAMAGES
from .damage_kinds import KINDS, Sample


def campaign(damages: int, seed: int = 0) -> dict[str, Counter]:
    """Kind to outcome to number, of ``damages`` in all.

    Other errors than a ``UsageError`` count by their name.
    """
    found = {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(KINDS):
            sample = Sample(kind, Path(folder) / str(number))
            share = damages // len(KINDS) + (number < damages % len(KINDS))
            for i in range(share):
                how = list(DAMAGES)[i % len(DAMAGES)]
                try:
                    found[kind][sample.try_damage(how, seed * damages + i)] += 1
                except Exception as e:
                    found[kind]['another error'] += 1
                    print(f'{kind}, {how}, {seed * damages + i}: {e!r}', file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--damages', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0, help='other damages')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    columns = ('detected', 'harmless', 'silently wrong', 'another error')
    total: Counter = Counter()
    print(f'| kind | tried | {" | ".join(columns)} |\n| --- |{" --- |" * (len(columns) + 1)}')
    for kind, found in campaign(args.damages, args.seed).items():
        total += found
        numbers = ' | '.join(str(found[name]) for name in columns)
        print(f'| {kind} | {found.total()} | {numbers} |')
    print(f'| all | {total.total()} | {" | ".join(str(total[name]) for name in columns)} |')
    if total['silently wrong'] or total['another error']:
        sys.exit(1)


if __name__ == '__main__':
    main()
