# Copyright (c) mmfgm authors.
"""GenEval over generated samples: which images, which verdicts, on any number of processes, and
after a kill."""

import hashlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from torch.utils.data import Dataset

import mmfgm.engine  # noqa: F401
from mmfgm.caches import ShardWriter
from mmfgm.errors import UsageError
from mmfgm.evaluation import Evaluation, to_uint8
from mmfgm.evaluation.geneval import GenEvalPrompts, Scorer, generate, judge, summarize
from mmfgm.evaluation.geneval.folder.layout import read_image, read_results, scan_folder
from mmfgm.models import Sampling
from mmfgm.registry import DATASETS
from tests.conftest import run_module
from tests.geneval_standin import METRIC, ROWS, Echo, StandInColors, StandInDetector, write_prompts

SAMPLING = Sampling('generator_ema')
N = 3  # samples of a prompt


@DATASETS.register_module()
class StandInPrompts(Dataset):
    samples_per_prompt = N

    def __init__(self, prompts=None):
        self.rows = ROWS[:prompts]

    def __len__(self):
        return len(self.rows) * N

    def row(self, index):
        return self.rows[index // N]

    def __getitems__(self, indices):
        return dict(idx=torch.as_tensor(indices), seed=torch.as_tensor(indices))


def build(batch_size=4, metric=METRIC, **dataset):
    MMLogger.get_instance('test')
    with DefaultScope.overwrite_default_scope('mmfgm'):
        return Evaluation(
            name='geneval',
            sampling=dict(network='generator_ema'),
            batch_size=batch_size,
            metrics=dict(geneval=metric),
            dataset=dict(type='StandInPrompts', **dataset),
        )


def content(folder):
    """What an evaluation left, without the folder's own name and the order in which verdicts
    came."""
    files = {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b'')
        for path in folder.rglob('*')
        if path.is_file() and 'verdicts' not in path.parts
    }
    assert len(files) == len(ROWS) * (N + 1) + len(ROWS) + 2
    return files


def main(out):
    """Run by every process of a torchrun: an evaluation that is stopped on one process, and one
    that takes it up."""
    dist.init_process_group('gloo')
    first = Echo(fail_after=4)
    try:
        build(2).run(first, SAMPLING, out)
    except KeyboardInterrupt:
        pass
    dist.barrier()
    second = Echo()
    values = build(2).run(second, SAMPLING, out)
    generated = [None] * dist.get_world_size()
    dist.all_gather_object(generated, (first.generated, second.generated))
    master_only(print)('RESULT', json.dumps([values, generated]))
    dist.destroy_process_group()


def test_images_and_verdicts_are_those_of_the_items(tmp_path):
    evaluation = build()
    values = evaluation.run(Echo(), SAMPLING, str(tmp_path / 'one'))
    assert (
        list(values) == evaluation.value_names
        and 'geneval/overall' in values
        and 'geneval/overall_low' in values
    )
    rows = read_results(str(tmp_path / 'one' / 'results.jsonl'))
    assert values == {f'geneval/{name}': value for name, value in summarize(rows).items()}
    assert 0 < values['geneval/images'] < 1
    # each verdict once more, image by image, colours asked for by the judge itself
    detector, colors = StandInDetector(), StandInColors()
    entries, missing = scan_folder(str(tmp_path / 'one'), N)
    assert len(entries) == len(rows) == N * len(ROWS) and not missing
    for idx, (entry, row) in enumerate(zip(entries, rows)):
        image = read_image(str(tmp_path / 'one' / entry.name))
        assert (
            np.array_equal(image, to_uint8(Echo.image(idx)).permute(1, 2, 0))
            and entry.row == ROWS[idx // N]
        )
        seen = detector([image])[0]

        def ask(name, indices, image=image, seen=seen):
            crops = (image, seen.boxes[name][indices], seen.masks(name, indices), name)
            return colors.classify([crops])[0]

        verdict = judge(entry.row, seen.boxes, ask)
        assert (row['correct'], row['reason']) == (verdict.correct, verdict.reason)
        assert json.loads(row['details']) == {
            name: seen.boxes[name][kept].tolist() for name, kept in verdict.kept.items()
        }
    # the batch size changes nothing, and without a folder there are only numbers
    for size in (1, 5, 18):
        assert build(size).run(Echo(), SAMPLING, str(tmp_path / str(size))) == values
        assert content(tmp_path / str(size)) == content(tmp_path / 'one')
    assert build().run(Echo(), SAMPLING) == values
    assert evaluation.run(Echo(), SAMPLING, str(tmp_path / 'again')) == values


def test_an_interrupted_evaluation_repeats_nothing(tmp_path):
    whole = build().run(Echo(), SAMPLING, str(tmp_path / 'whole'))
    model = Echo(fail_after=8)
    with pytest.raises(KeyboardInterrupt):
        build().run(model, SAMPLING, str(tmp_path / 'parts'))
    rest = Echo()
    assert build(3).run(rest, SAMPLING, str(tmp_path / 'parts')) == whole
    assert sorted(model.generated + rest.generated) == list(range(18)) and len(model.generated) == 8
    assert content(tmp_path / 'parts') == content(tmp_path / 'whole')
    # an image that was lost is generated again, it alone
    (tmp_path / 'parts' / '00002' / 'samples' / '0001.png').unlink()
    lost = Echo()
    assert build().run(lost, SAMPLING, str(tmp_path / 'parts')) == whole and lost.generated == [7]
    # nothing is left to do
    none = Echo()
    evaluation = build()
    assert evaluation.run(none, SAMPLING, str(tmp_path / 'parts')) == whole and none.generated == []
    assert sum(len(batch['idx']) for batch in evaluation.loader) == 18


def test_a_resumed_evaluation_counts_what_was_there(tmp_path, monkeypatch):
    """And one that fails leaves neither the device occupied nor items out."""
    emptied, lines, clock = [], [], iter(range(0, 10000, 31))
    monkeypatch.setattr('mmfgm.evaluation.geneval.metric.get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: emptied.append(True))
    StandInDetector.devices.clear()
    evaluation = build()
    for fail_after in (8, 4):
        with pytest.raises(KeyboardInterrupt):
            evaluation.run(Echo(fail_after), SAMPLING, str(tmp_path))
    assert StandInDetector.devices == ['cuda', 'cpu'] * 2 and len(emptied) == 2
    assert sum(len(batch['idx']) for batch in evaluation.loader) == 18
    monkeypatch.setattr(
        'mmfgm.evaluation.evaluate.time', SimpleNamespace(monotonic=lambda: next(clock))
    )
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', lines.append)
    evaluation.run(Echo(), SAMPLING, str(tmp_path))
    assert [line.split(',')[0] for line in lines if 'samples' in line] == [
        'geneval: 16/18 samples',
        'geneval: 18/18 samples',
    ]


def other_weights():
    model = Echo()
    torch.nn.init.constant_(model.generator_ema.weight, 2)
    return model


@pytest.mark.parametrize(
    'again',
    [
        lambda out: build().run(other_weights(), SAMPLING, out),
        lambda out: build().run(Echo(), Sampling('generator_ema', solver='heun', nfe=2), out),
        lambda out: build().run(Echo(), SAMPLING, out, config=dict(t_star=0.5)),
        lambda out: build(metric=dict(METRIC, detector=dict(type='StandInDetector', salt=1.0))).run(
            Echo(), SAMPLING, out
        ),
        lambda out: build(metric=dict(METRIC, options=dict(threshold=0.5))).run(
            Echo(), SAMPLING, out
        ),
    ],
    ids=['weights', 'sampling', 'config', 'detector', 'options'],
)
def test_images_and_verdicts_of_something_else_are_not_taken_up(tmp_path, again, monkeypatch):
    generated = []
    sample = Echo.sample
    monkeypatch.setattr(
        Echo,
        'sample',
        lambda self, *args: (sample(self, *args), generated.extend(self.generated[-4:]))[0],
    )
    build().run(Echo(), SAMPLING, str(tmp_path))
    del generated[:]
    again(str(tmp_path))
    assert sorted(set(generated)) == list(range(18))


def test_fewer_prompts_leave_no_old_images(tmp_path):
    build().run(Echo(), SAMPLING, str(tmp_path))
    build(prompts=2).run(Echo(), SAMPLING, str(tmp_path))
    assert (
        len(scan_folder(str(tmp_path), N)[0])
        == 6
        == len(read_results(str(tmp_path / 'results.jsonl')))
    )


@pytest.mark.slow
def test_two_processes_equal_one_also_after_an_interruption(tmp_path):
    expected = build().run(Echo(), SAMPLING, str(tmp_path / 'one'))
    out = run_module('tests.test_evaluation.test_geneval_metric', tmp_path / 'two', nproc=2).stdout
    values, generated = json.loads(
        next(line for line in out.splitlines() if line.startswith('RESULT'))[len('RESULT') :]
    )
    assert values == expected and content(tmp_path / 'two') == content(tmp_path / 'one')
    assert [len(part) for part, _ in generated] == [4, 4]
    # the rest is shared out anew
    assert [len(part) for _, part in generated] == [5, 5]
    assert sorted(i for parts in generated for part in parts for i in part) == list(range(18))


def test_pictures_and_what_else_is_left(tmp_path):
    StandInDetector.devices.clear()
    evaluation = build(metric=dict(METRIC, keep_images=False, sheet_prompts=1))
    assert StandInDetector.devices == []
    evaluation.run(Echo(), SAMPLING, str(tmp_path))
    assert StandInDetector.devices == [
        'cpu',
        'cpu',
    ]  # to the device, which is the CPU here, and back
    pictures = evaluation.pictures()
    assert sorted(pictures) == sorted(f'geneval_{row["tag"]}' for row in ROWS)
    for row in ROWS:
        assert np.array_equal(
            read_image(str(tmp_path / 'sheets' / f'{row["tag"]}.png')),
            pictures[f'geneval_{row["tag"]}'],
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'metrics.json',
        'results.jsonl',
        'sheets',
    ]
    about = json.loads((tmp_path / 'metrics.json').read_text())
    assert (
        about['nfe'] == 1 and about['network'] == 'generator_ema' and about['comparable'] is False
    )
    assert about['detector'] == about['note'] == StandInDetector.label
    assert about['colors'] == StandInColors.label
    # what the verdicts depend on, to be held against another run's
    assert about['scorer']['detector']['type'] == 'StandInDetector'
    assert about['scorer']['colors']['type'] == 'StandInColors'


def test_two_detectors_beside_each_other(tmp_path):
    other = dict(METRIC, detector=dict(type='StandInDetector', salt=1.0))
    with DefaultScope.overwrite_default_scope('mmfgm'):
        evaluation = Evaluation(
            name='both',
            sampling=dict(network='generator_ema'),
            batch_size=4,
            metrics=dict(a=METRIC, b=other),
            dataset=dict(type='StandInPrompts'),
        )
    values = evaluation.run(Echo(), SAMPLING, str(tmp_path))
    for key, metric in dict(a=METRIC, b=other).items():
        alone = build(metric=metric).run(Echo(), SAMPLING)
        assert {
            name.replace('geneval/', f'both/{key}_'): value for name, value in alone.items()
        }.items() <= values.items()
        assert len(read_results(str(tmp_path / key / 'results.jsonl'))) == 18
    a, b = (
        [row['correct'] for row in read_results(str(tmp_path / key / 'results.jsonl'))]
        for key in 'ab'
    )
    assert a != b and f'both_a_{ROWS[0]["tag"]}' in evaluation.pictures()
    model = Echo()
    assert evaluation.run(model, SAMPLING, str(tmp_path)) == values and model.generated == []


def test_bad_input(monkeypatch):
    with pytest.raises(UsageError, match='unknown GenEval option .tresh.'):
        build(metric=dict(METRIC, options=dict(tresh=0.3)))
    monkeypatch.setattr(StandInDetector, 'threshold', 0.3, raising=False)
    scorer = build(metric=dict(METRIC, options=dict(threshold=0.3))).built['geneval'].scorer
    assert (
        scorer.note
        == f"{scorer.label}; options {{'threshold': 0.3}}, not comparable with published scores"
    )
    with pytest.raises(
        UsageError, match='leaves out those below 0.3; set detector.score_threshold=0.2'
    ):
        build(metric=dict(METRIC, options=dict(threshold=0.2)))
    with (
        pytest.raises(UsageError, match='GenEval needs a dataset that knows its prompts'),
        DefaultScope.overwrite_default_scope('mmfgm'),
    ):
        Evaluation(
            name='e',
            sampling={},
            metrics=dict(m=METRIC),
            dataset=dict(type='GenerationDataset', num_samples=4),
        )
    with pytest.raises(
        UsageError, match="'a photo of a white bench' asks for a colour, but no colour classifier"
    ):
        build(metric=dict(METRIC, colors=None))
    build(metric=dict(METRIC, colors=None), prompts=3)
    latents = Echo()
    latents.sample = lambda batch, sampling: torch.zeros(len(batch['idx']), 16, 8, 8)
    with pytest.raises(
        UsageError, match=r'samples have shape \(4, 16, 8, 8\); latents need model.decoder'
    ):
        build().run(latents, SAMPLING)


def test_colours_of_a_batch_are_classified_together(monkeypatch):
    calls = []
    classify = StandInColors.classify
    monkeypatch.setattr(
        StandInColors,
        'classify',
        lambda self, requests: calls.append(len(requests)) or classify(self, requests),
    )
    rows = [ROWS[i] for i in (5, 0, 3, 5, 5, 3)]
    images = [to_uint8(Echo.image(i)).permute(1, 2, 0).numpy() for i in range(6)]
    with DefaultScope.overwrite_default_scope('mmfgm'):
        scorer = Scorer(METRIC['detector'], METRIC['colors'])
    together = scorer.score(images, rows)
    assert calls == [sum(calls)] and calls[0] > 2
    assert together == [scorer.score([image], [row])[0] for image, row in zip(images, rows)]
    assert len({judged.verdict.correct for judged in together}) == 2


def make_cache(folder, rows):
    """A cache of embeddings that name their prompt."""
    prompts = [json.dumps(row['prompt']) for row in rows]
    job = dict(
        kind='prompts',
        identity={},
        settings=dict(dtype='float32'),
        layout=dict(clip=[2, 3], t5=[2, 3], pooled=[1]),
        source=dict(
            count=len(rows), sha256=hashlib.sha256('\n'.join(prompts).encode()).hexdigest()
        ),
    )
    writer = ShardWriter(str(folder), job)
    writer.begin()
    number = torch.arange(len(rows), dtype=torch.float32)
    writer.write(
        writer.name(0),
        dict(
            clip=torch.zeros(len(rows), 2, 3),
            t5=torch.zeros(len(rows), 2, 3),
            pooled=number[:, None],
        ),
        len(rows),
    )
    writer.finish([writer.name(0)])
    return str(folder)


def test_items_are_pairs_of_prompt_and_sample(tmp_path):
    dataset = GenEvalPrompts(make_cache(tmp_path / 'cache', generate()))
    assert len(dataset) == 2212 and dataset.row(2211) == generate()[552]
    batch = dataset.__getitems__([0, 3, 4, 2211, 2212])  # the last is padding
    assert batch['cond']['pooled_embeds'][:, 0].tolist() == [0, 0, 1, 552, 0]
    assert batch['seed'].tolist() == [0, 3, 4, 2211, 2212]
    assert batch.keys() == {'idx', 'seed', 'cond'}
    other = GenEvalPrompts(str(tmp_path / 'cache'), seed=1)
    assert not set(other.__getitems__(range(50))['seed'].tolist()) & set(
        dataset.__getitems__(range(2212))['seed'].tolist()
    )
    own = write_prompts(tmp_path / 'own.jsonl')
    with pytest.raises(
        UsageError, match=r'holds 553 other prompts than .*own.jsonl \(6\).*geneval.py prompts'
    ):
        GenEvalPrompts(str(tmp_path / 'cache'), metadata=own)
    small = GenEvalPrompts(make_cache(tmp_path / 'small', ROWS), metadata=own, samples_per_prompt=2)
    assert len(small) == 12 and small.row(3) == ROWS[1]
    with pytest.raises(UsageError, match='at least 1'):
        GenEvalPrompts(str(tmp_path / 'small'), metadata=own, samples_per_prompt=0)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
