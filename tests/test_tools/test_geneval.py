# Copyright (c) mmfgm authors.
"""tools/geneval.py as a user runs it, with a tiny pipeline and detector: folders, pipelines, kills,
bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
from mmengine.registry import DefaultScope

from mmfgm.caches import read_prompts
from mmfgm.errors import UsageError
from mmfgm.evaluation import Evaluation, to_uint8
from mmfgm.evaluation.geneval import DiffusersPipeline, Scorer, generate, summarize
from mmfgm.evaluation.geneval.folder.layout import (
    Entry,
    encode_png,
    image_name,
    read_image,
    read_results,
    write_image,
)
from mmfgm.tools.cache_prompts import cache_prompts
from mmfgm.tools.export_diffusers import export_diffusers
from mmfgm.tools.geneval import geneval
from tests.conftest import LIMIT, ROOT, run_module, tool_env
from tests.geneval_standin import METRIC, ROWS, Echo, write_prompts
from tests.test_apis.conftest import sd3, sd3_folder  # noqa: F401 - fixtures
from tests.tiny_sd3 import make_tiny_sd3

SMALL = ('--num-samples', '3', '--num-workers', '0', '--batch-size', '4')
DETECTOR = 'evaluations.geneval.metrics.geneval.detector'
COLORS = 'evaluations.geneval.metrics.geneval.colors'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """The SD3 config with a tiny pipeline and a stand-in detector; its prompts lie beside it."""
    folder = tmp_path_factory.mktemp('geneval')
    make_tiny_sd3(folder / 'model')
    write_prompts(folder / 'prompts.jsonl')
    (folder / 'tiny.py').write_text(f"""
_base_ = [{str(ROOT / 'configs/geneval/sd3.py')!r}]
custom_imports = dict(imports=['tests.geneval_standin'])
pipeline = dict(pretrained={str(folder / 'model')!r}, dtype='float32', batch_size=2,
                call=dict(num_inference_steps=2, height=16, width=16, max_sequence_length=32))
evaluations = dict(geneval=dict(metrics=dict(geneval=dict(
    detector=dict(_delete_=True, type='StandInDetector'),
    colors=dict(_delete_=True, type='StandInColors')))))
""")
    return folder / 'tiny.py'


@pytest.fixture
def images(tmp_path):
    """Three images of each prompt, in the reference's layout."""
    for idx in range(3 * len(ROWS)):
        entry = Entry(image_name(*divmod(idx, 3)), ROWS[idx // 3])
        write_image(
            str(tmp_path / 'images'),
            entry,
            encode_png(to_uint8(Echo.image(idx)).permute(1, 2, 0).numpy()),
        )
    return tmp_path / 'images'


def run(config, out, *more):
    prompts = str(config.with_name('prompts.jsonl'))
    return geneval(
        ['run', str(config), '--prompts', prompts, '--work-dir', str(out), *SMALL, *more]
    )


def score(config, folder, *more):
    return geneval(['score', str(folder), '--config', str(config), *SMALL, *more])


def results(folder):
    return [
        {**row, 'filename': row['filename'].removeprefix(str(folder))}
        for row in read_results(str(folder / 'results.jsonl'))
    ]


def png(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.glob('0*/samples/*')
    }


@pytest.fixture
def counted(monkeypatch):
    """Counts images that are generated and judged."""
    counts = dict(generated=0, judged=0)
    make, judge = DiffusersPipeline.generate, Scorer.score

    def count_generated(self, prompts, seeds):
        counts['generated'] += len(prompts)
        return make(self, prompts, seeds)

    def count_judged(self, images, rows):
        counts['judged'] += len(rows)
        return judge(self, images, rows)

    monkeypatch.setattr(DiffusersPipeline, 'generate', count_generated)
    monkeypatch.setattr(Scorer, 'score', count_judged)
    return counts


@pytest.mark.slow
def test_a_pipeline_on_two_processes_equals_one(config, tmp_path, counted, capsys):
    result = run(config, tmp_path / 'one')
    assert counted == dict(generated=18, judged=18) and result['bad'] == {}
    printed = capsys.readouterr().out
    assert f'overall            {result["scores"]["overall"]:.4f}  95% interval' in printed
    assert (
        'NFE                     2  network evaluations' in printed
        and 'not comparable with published' in printed
    )
    about = json.loads((tmp_path / 'one' / 'metrics.json').read_text())
    assert (
        about['nfe'] == 2
        and about['scores'] == result['scores'] == summarize(result['rows'])
        and not about['comparable']
    )
    assert len(list((tmp_path / 'one' / 'sheets').glob('*.png'))) == len(ROWS)
    # prompts and samples have noise of their own
    assert len(set(png(tmp_path / 'one').values())) == 18

    path = f'{sys.executable.rsplit("/", 1)[0]}:{tool_env()["PATH"]}'
    command = [
        'bash',
        'tools/dist_geneval.sh',
        '2',
        'run',
        str(config),
        '--prompts',
        str(config.with_name('prompts.jsonl')),
        '--work-dir',
        str(tmp_path / 'two'),
        *SMALL,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=tool_env(PATH=path, PORT='29573'),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-6000:]}'
    assert png(tmp_path / 'two') == png(tmp_path / 'one') and results(tmp_path / 'two') == results(
        tmp_path / 'one'
    )
    assert json.loads((tmp_path / 'two' / 'metrics.json').read_text()) == about
    # a second run has nothing to do, and a third one of something else does not take the images for
    # its own
    assert run(config, tmp_path / 'two')['scores'] == result['scores'] and counted == dict(
        generated=18, judged=18
    )
    assert 'NFE                     2' in capsys.readouterr().out
    for other in (['--seed', '1'], ['--cfg-options', 'pipeline.call.guidance_scale=3']):
        with pytest.raises(
            UsageError, match='holds images of something else: .*(seed is 0|guidance_scale is 7.0)'
        ):
            run(config, tmp_path / 'two', *other)


@pytest.mark.slow
def test_an_exported_generator_makes_the_images_of_the_training(config, sd3, sd3_folder, tmp_path):
    """Both ways to a score of ours, ``tools/geneval.py run configs/geneval/fgm_sd3.py`` and the
    metric, image by image."""
    prompts = str(config.with_name('prompts.jsonl'))
    export_diffusers([sd3.config, sd3.weights, str(tmp_path / 'export')])
    (tmp_path / 'ours.py').write_text(
        config.read_text()
        .replace('geneval/sd3.py', 'geneval/fgm_sd3.py')
        .replace(str(config.with_name('model')), str(tmp_path / 'export'))
        .replace('num_inference_steps=2, ', '')
    )
    geneval(
        [
            'run',
            str(tmp_path / 'ours.py'),
            '--prompts',
            prompts,
            '--work-dir',
            str(tmp_path / 'exported'),
            *SMALL,
        ]
    )
    assert json.loads((tmp_path / 'exported' / 'metrics.json').read_text())['nfe'] == 1

    cache_prompts(
        [
            prompts,
            str(tmp_path / 'cache'),
            '--model',
            sd3_folder,
            '--max-length',
            '32',
            '--dtype',
            'fp32',
        ]
    )
    with DefaultScope.overwrite_default_scope('mmfgm'):
        evaluation = Evaluation(
            name='geneval',
            sampling=dict(network='generator_ema'),
            batch_size=5,
            metrics=dict(geneval=METRIC),
            dataset=dict(
                type='GenEvalPrompts',
                path=str(tmp_path / 'cache'),
                metadata=prompts,
                samples_per_prompt=3,
            ),
        )
    evaluation.run(sd3.model, out_dir=str(tmp_path / 'trained'))
    pairs = [
        [
            read_image(str(tmp_path / which / row['filename'].lstrip('/'))).astype(int)
            for which in ('exported', 'trained')
        ]
        for row in results(tmp_path / 'exported')
    ]
    # uint8 by two rules, half a step apart
    assert len(pairs) == 18 and max(np.abs(a - b).max() for a, b in pairs) <= 1
    assert min(np.abs(a - pairs[i - 1][0]).max() for i, (a, _) in enumerate(pairs)) > 5


@pytest.mark.slow
def test_a_killed_run_repeats_nothing(config, tmp_path, counted, monkeypatch):
    whole = run(config, tmp_path / 'whole')
    generate_images = DiffusersPipeline.generate
    left = [3]

    def stop(self, prompts, seeds):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return generate_images(self, prompts, seeds)

    monkeypatch.setattr(DiffusersPipeline, 'generate', stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / 'parts')
    assert len(png(tmp_path / 'parts')) == 6
    monkeypatch.setattr(DiffusersPipeline, 'generate', generate_images)
    # judged by a process that is killed: a verdict holds whatever became of its process
    counted.update(generated=0, judged=0)
    run_module(
        'mmfgm.tools.geneval',
        'run',
        config,
        '--prompts',
        config.with_name('prompts.jsonl'),
        '--work-dir',
        tmp_path / 'parts',
        *SMALL,
        codes=(-9,),
        env=tool_env(KILL_AFTER='9'),
    )
    assert (
        png(tmp_path / 'parts') == png(tmp_path / 'whole')
        and not (tmp_path / 'parts' / 'results.jsonl').exists()
    )
    assert run(config, tmp_path / 'parts')['scores'] == whole['scores']
    assert counted == dict(generated=0, judged=18 - 8)
    assert results(tmp_path / 'parts') == results(tmp_path / 'whole')


def test_images_that_are_missing_or_unreadable(config, images, capsys, counted):
    whole = score(config, images)
    assert counted['judged'] == 18 and not whole['bad']
    (images / '00002' / 'samples' / '0001.png').write_bytes(b'no image')
    (images / '00004' / 'samples' / '0002.png').unlink()
    bad = ['00002/samples/0001.png', '00004/samples/0002.png']
    failed = score(config, images)
    assert counted['judged'] == 18 and list(failed['bad']) == bad
    printed = capsys.readouterr().out
    assert (
        '2 images are missing or unreadable and count as wrong' in printed
        and '00004/samples/0002.png: missing' in printed
    )
    assert 'cannot be read as an image' in printed
    rows = {row['filename']: row for row in results(images)}
    assert len(rows) == 18 and [rows[f'/{name}']['correct'] for name in bad] == [False, False]
    assert rows[f'/{bad[1]}']['reason'] == 'no image: missing'
    skipped = score(config, images, '--on-bad', 'skip')
    assert (
        len(results(images)) == 16
        and '2 images are missing or unreadable and are left out' in capsys.readouterr().out
    )
    assert json.loads((images / 'metrics.json').read_text())['bad'].keys() == set(bad)
    # the rest is judged as before
    kept = {row['filename']: row for row in whole['rows'] if row['filename'] not in bad}
    for result in (failed, skipped):
        assert {
            row['filename']: row for row in result['rows'] if row['filename'] not in bad
        } == kept
    assert skipped['scores']['images'] == np.mean([row['correct'] for row in kept.values()])
    assert failed['scores']['images'] == pytest.approx(skipped['scores']['images'] * 16 / 18)


def test_detector_and_clip_of_random_weights(images, tmp_path, capsys):
    """Our own detector and colours, configured as a user without mmcv's ops does it."""
    from tests.tiny_detector import SIZE, make_clip, make_transformers_folder

    folder = make_transformers_folder(tmp_path / 'mask2former')
    name, weights = make_clip(tmp_path)
    options = [
        '--cfg-options',
        f'{DETECTOR}._delete_=True',
        f'{DETECTOR}.type=TransformersMask2Former',
        f'{DETECTOR}.pretrained={folder}',
        f'{DETECTOR}.size=({SIZE[0]},{SIZE[1]})',
        f'{COLORS}.model={name}',
        f'{COLORS}.pretrained={weights}',
    ]
    together, alone = (
        geneval(
            [
                'score',
                str(images),
                '--work-dir',
                str(tmp_path / size),
                '--num-samples',
                '3',
                '--num-workers',
                '0',
                '--batch-size',
                size,
                *options,
            ]
        )
        for size in ('7', '1')
    )
    printed = capsys.readouterr().out
    assert 'not comparable with published' in printed
    found = [json.loads(row['details']) for row in together['rows']]
    assert len(found) == 18 and any(found)
    assert [(row['correct'], row['reason']) for row in together['rows']] == [
        (row['correct'], row['reason']) for row in alone['rows']
    ]
    assert not list(images.glob('*.json*'))  # results are where --work-dir says


def test_prompts_and_summary(config, images, tmp_path, capsys):
    out = tmp_path / 'new' / 'prompts.jsonl'
    geneval(['prompts', str(out)])
    assert [json.loads(line) for line in out.read_text().splitlines()] == generate()
    assert read_prompts(str(out), 'prompt')[1] == [row['prompt'] for row in generate()]
    with pytest.raises(UsageError, match='exists; overwrite it with --force'):
        geneval(['prompts', str(out)])
    geneval(['prompts', str(out), '--force', '--seed', '1', '--n', '2'])
    assert len(out.read_text().splitlines()) == 90
    scored = score(config, images)
    capsys.readouterr()
    assert geneval(['summary', str(images / 'results.jsonl')])['scores'] == scored['scores']
    assert f'{scored["scores"]["overall"]:.4f}' in capsys.readouterr().out
    for broken in ('{"nfe": 1', '[1]'):
        (images / 'metrics.json').write_text(broken)
        with pytest.raises(UsageError, match="metrics.json' is .*; remove it"):
            geneval(['summary', str(images / 'results.jsonl')])


@pytest.mark.parametrize(
    'args, message',
    [
        (['score', 'IMAGES/00000'], 'holds no folders named by digits'),
        (['score', 'IMAGES', '--num-samples', '2'], 'has 3 images, expected 2'),
        (['score', 'IMAGES', '--num-samples', '-1'], '--num-samples must be at least 0'),
        (['score', 'IMAGES', '--batch-size', '0'], '--batch-size must be at least 1'),
        (
            ['score', 'IMAGES', '--cfg-options', f'{COLORS}=None'],
            'asks for a colour, but no colour classifier',
        ),
        (['score', 'IMAGES', '--cfg-options', f'{DETECTOR}.type=Yolo'], 'Yolo is not in the'),
        (
            ['score', 'IMAGES', '--config', str(ROOT / 'configs/fgm/digits.py')],
            'has no metric of type GenEval',
        ),
        (['run', 'CONFIG', '--num-samples', '0'], '--num-samples must be at least 1'),
        (
            ['run', 'CONFIG', '--prompts', 'IMAGES/00000/samples/0000.png'],
            'cannot be read',
        ),
        (['run', 'CONFIG', '--cfg-options', 'pipeline=None'], 'describes no pipeline'),
        (
            ['run', 'CONFIG', '--cfg-options', 'pipeline.pretrained=/nowhere/sd3'],
            'there is no folder',
        ),
        (['run', 'CONFIG', '--work-dir', 'IMAGES', '--prompts', 'PROMPTS'], 'holds images already'),
        (['prompts', 'out.jsonl', '--n', '0'], '--n must be at least 1'),
        (['summary', 'IMAGES/00000/metadata.jsonl'], 'line 1: lacks filename'),
    ],
)
def test_bad_input(config, images, args, message, counted):
    places = dict(
        IMAGES=str(images), CONFIG=str(config), PROMPTS=str(config.with_name('prompts.jsonl'))
    )
    args = [
        places.get(arg.split('/')[0], arg.split('/')[0]) + arg[len(arg.split('/')[0]) :]
        for arg in args
    ]
    if args[0] == 'score' and '--config' not in args:
        args += ['--config', str(config)]
    if args[0] in ('score', 'run') and '--num-samples' not in args:
        args += ['--num-samples', '3']
    with pytest.raises(UsageError, match=message):
        geneval(args)
    assert counted == dict(generated=0, judged=0)
