# Copyright (c) mmfgm authors.
"""GenEval's scores from the verdicts on single images."""

import numpy as np

from mmfgm.errors import UsageError

# beside those of the tasks
SCORES = ('overall', 'overall_low', 'overall_high', 'images', 'prompts')


def _bootstrap(tasks: list[np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """Overall scores ``(resamples,)``, prompts drawn with replacement within each task.

    Args:
        tasks (list[np.ndarray]): Per task ``(prompts, 2)``: images that are correct, and images, of
            each prompt.
    """
    rng = np.random.default_rng(seed)
    scores = []
    for counts in tasks:
        # how often each prompt is drawn: (resamples, prompts)
        draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=resamples)
        correct, images = (draws @ counts).T
        scores.append(correct / images)
    return np.mean(scores, axis=0)


def summarize(rows: list[dict], resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """GenEval's scores, each a fraction in [0, 1].

    Args:
        rows (list[dict]): One per image, as in the reference's ``results.jsonl``; of their keys
            ``tag``, ``correct`` and ``metadata`` (JSON text that identifies the prompt) are used.
            Their order does not matter.
        resamples (int): Bootstrap resamples of the interval.
        seed (int): Seed of the bootstrap.

    Returns:
        dict[str, float]: Per tag the fraction of its images that are correct; ``overall``, the
        unweighted mean of
            these; ``overall_low`` and ``overall_high``, its 95% bootstrap interval over prompts;
            ``images``, the fraction of images that are correct; ``prompts``, the fraction of
            prompts with a correct image.

    Raises:
        UsageError: Without rows, if a row lacks a key, or if a tag has the name of another score.
    """
    if not rows:
        raise UsageError('no GenEval verdicts to summarize; judge at least one image')
    # tag -> metadata -> [correct images, images]
    tasks = {}
    for row in rows:
        for key in ('tag', 'correct', 'metadata'):
            if key not in row:
                raise UsageError(f'a GenEval verdict lacks {key!r}: {row}')
        if row['tag'] in SCORES:
            raise UsageError(
                f'the tag {row["tag"]!r} has the name of another score; rename it in the prompt'
                ' file'
            )
        counts = tasks.setdefault(row['tag'], {}).setdefault(row['metadata'], [0, 0])
        counts[0] += bool(row['correct'])
        counts[1] += 1
    # sorted: the interval must not depend on the order in which a file system lists folders
    arrays = {
        tag: np.array([prompts[text] for text in sorted(prompts)])
        for tag, prompts in sorted(tasks.items())
    }
    every = np.concatenate(list(arrays.values()))
    scores = {tag: float(arrays[tag][:, 0].sum() / arrays[tag][:, 1].sum()) for tag in tasks}
    low, high = np.percentile(_bootstrap(list(arrays.values()), resamples, seed), [2.5, 97.5])
    return {
        **scores,
        'overall': float(np.mean(list(scores.values()))),
        'overall_low': float(low),
        'overall_high': float(high),
        'images': float(every[:, 0].sum() / every[:, 1].sum()),
        'prompts': float((every[:, 0] > 0).mean()),
    }
