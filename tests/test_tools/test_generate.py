# Copyright (c) mmfgm authors.
import json

import numpy as np
import pytest
from PIL import Image

from mmfgm.apis import FGMInferencer, export_generator, read_config
from mmfgm.models import Sampling
from mmfgm.tools.generate import build_inferencer, generate, main, parse_args, samplings_of
from tests.test_apis.conftest import digits, shapes, toy  # noqa: F401 - fixtures
from tests.test_tools.test_bad_input import run


@pytest.fixture(scope='module')
def export(digits, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('export') / 'out')
    export_generator(read_config(digits.config), digits.weights, out)
    return out


def pixels(path):
    return np.asarray(Image.open(path))


def lines(folder):
    return [json.loads(line) for line in (folder / 'metadata.jsonl').read_text().splitlines()]


def test_labels_beside_the_teacher(digits, tmp_path, capsys):
    out = tmp_path / 'out'
    generate(
        [
            digits.config,
            digits.weights,
            '--labels',
            '3',
            '1',
            '4',
            '--seeds',
            '7',
            '--out',
            str(out),
            '--batch-size',
            '2',
            '--compare',
            '4',
            '--solver',
            'heun',
        ]
    )
    inferencer = FGMInferencer(digits.config, digits.weights)
    for i, (label, seed) in enumerate([(3, 7), (1, 8), (4, 9)]):
        (ours,) = inferencer(label, seeds=seed, out='numpy')['predictions']
        (theirs,) = inferencer(
            label, seeds=seed, out='numpy', network='teacher', nfe=4, solver='heun'
        )['predictions']
        # a level of grey apart at most, as batches of other sizes round differently
        assert np.abs(pixels(out / f'{i:06d}.png') - ours[..., 0].astype(int)).max() <= 1
        assert np.abs(pixels(out / f'{i:06d}_teacher.png') - theirs[..., 0].astype(int)).max() <= 1
    assert lines(out)[2] == dict(
        file='000002.png',
        seed=9,
        label=4,
        network='generator_ema',
        nfe=1,
        solver='euler',
        shift=None,
        guidance=None,
        spacing='uniform',
        guidance_channels=None,
        deterministic=False,
    )
    assert lines(out)[5] == dict(
        file='000002_teacher.png',
        seed=9,
        label=4,
        network='teacher',
        nfe=4,
        solver='heun',
        shift=None,
        guidance=None,
        spacing='uniform',
        guidance_channels=None,
        deterministic=False,
    )
    assert (
        pixels(out / 'grid.png').shape == (19, 19, 3)
        and Image.open(out / 'compare.png').size[0] > 1000
    )
    assert 'ETA 0:00:00' in capsys.readouterr().out and not list(tmp_path.glob('*.tmp*'))


def test_files_of_prompts(shapes, tmp_path):
    (tmp_path / 'prompts.jsonl').write_text('{"text": "a red circle"}\n{"text": "two squares"}\n')
    out = tmp_path / 'out'
    generate(
        [
            shapes.config,
            shapes.weights,
            '--prompts',
            str(tmp_path / 'prompts.jsonl'),
            '--column',
            'text',
            '--out',
            str(out),
            '--seeds',
            '5',
            '2',
            '--compare',
            '2',
        ]
    )  # guided as the config's sample pictures are
    assert [
        (line['prompt'], line['seed'], line['network'], line['guidance']) for line in lines(out)
    ] == [
        ('a red circle', 5, 'generator_ema', None),
        ('two squares', 2, 'generator_ema', None),
        ('a red circle', 5, 'teacher', 2.0),
        ('two squares', 2, 'teacher', 2.0),
    ]
    (image,) = FGMInferencer(shapes.config, shapes.weights)('two squares', seeds=2, out='numpy')[
        'predictions'
    ]
    assert np.abs(pixels(out / '000001.png') - image.astype(int)).max() <= 1


def test_of_an_export_and_again(export, tmp_path, capsys):
    out = tmp_path / 'out'
    generate([export, '--num-samples', '12', '--out', str(out)])
    assert [line['label'] for line in lines(out)] == [*range(10), 0, 1] and pixels(
        out / '000003.png'
    ).shape == (8, 8)
    code, message = run(main, [export, '--num-samples', '2', '--out', out], capsys)
    assert code == 2 and 'exists; replace it with --force' in message and len(lines(out)) == 12
    generate([export, '--num-samples', '2', '--out', str(out), '--force'])
    assert (
        len(lines(out)) == 2
        and not (out / '000003.png').exists()
        and not list(tmp_path.glob('*.tmp*'))
    )
    # what the tool did not write it does not delete: metadata.jsonl is also that of an image folder
    # for training
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'metadata.jsonl').write_text('years of work')
    code, message = run(
        main, [export, '--num-samples', '2', '--out', tmp_path / 'mine', '--force'], capsys
    )
    assert (
        code == 2
        and 'was not written by this tool' in message
        and (tmp_path / 'mine' / 'metadata.jsonl').exists()
    )


@pytest.mark.parametrize(
    'argv, main, teacher',
    [
        ('--network teacher', Sampling('teacher', 50, guidance=2.0), None),
        ('--network teacher --nfe 4', Sampling('teacher', 4, guidance=2.0), None),
        ('--network teacher --guidance 3', Sampling('teacher', 50, guidance=3.0), None),
        (
            '--guidance 3 --compare',
            Sampling('generator_ema'),
            Sampling('teacher', 50, guidance=3.0),
        ),
        (
            '--solver heun --compare 4',
            Sampling('generator_ema'),
            Sampling('teacher', 4, 'heun', guidance=2.0),
        ),
    ],
)
def test_what_is_not_said_is_as_the_config_samples(shapes, argv, main, teacher):
    args = parse_args(
        [shapes.config, shapes.weights, '--prompt', 'a red circle', '--out', 'x', *argv.split()]
    )
    expected = {'': main, **({'_teacher': teacher} if teacher else {})}
    assert samplings_of(args, build_inferencer(args)) == expected


@pytest.mark.parametrize(
    'argv, message',
    [
        ('CONFIG WEIGHTS --labels 3 10', 'whole numbers in [0, 9], not 10'),
        ('CONFIG WEIGHTS --labels 3 1 4 --seeds 1 2', 'there are 2 seeds for 3 inputs'),
        (
            'CONFIG WEIGHTS --labels 3 --seeds -1',
            'seeds are whole numbers in [0, 4294967295], not -1',
        ),
        (
            'CONFIG WEIGHTS --prompt cat',
            "this model has classes: inputs are whole numbers in [0, 9], not 'cat'",
        ),
        ('CONFIG WEIGHTS --prompts nowhere.txt', "'nowhere.txt' cannot be read"),
        ('CONFIG WEIGHTS --num-samples 0', '--num-samples must be at least 1, but is 0'),
        ('CONFIG WEIGHTS --labels 3 --network critic', "there is no network 'critic'"),
        ('CONFIG WEIGHTS --labels 3 --nfe 4', 'its NFE is 1, not 4'),
        (
            'CONFIG WEIGHTS --labels 3 --guidance 2',
            '--guidance are of an ODE solver, and generator_ema has none; add --compare',
        ),
        ('CONFIG WEIGHTS --labels 3 --compare 3 --solver heun', 'positive multiple'),
        ('CONFIG WEIGHTS --labels 3 --compare 3 --guidance 2', 'guidance=2.0 of teacher needs'),
        ('CONFIG WEIGHTS --labels 3 --batch-size 0', '--batch-size must be at least 1'),
        (
            'CONFIG WEIGHTS --labels 3 --cfg-options model.network.width=32',
            'is of another architecture',
        ),
        ('CONFIG nowhere.pth --labels 3', "'nowhere.pth' does not exist"),
        ('CONFIG TEACHER --labels 3', 'has no network'),
        ('nowhere.py WEIGHTS --labels 3', "there is no config 'nowhere.py'"),
        ('EXPORT WEIGHTS --labels 3', 'is an export, which holds its weights'),
        ('EXPORT --labels 3 --compare', '--compare needs the teacher'),
        ('SHAPES SHAPES_WEIGHTS --num-samples 3', 'this model takes prompts: give --prompt'),
        ('SHAPES SHAPES_WEIGHTS --prompt dragon', "the word 'dragon' of the prompt"),
        ('TOY TOY_WEIGHTS --num-samples 3', 'not pictures of 1 or 3 channels'),
    ],
)
def test_bad_input(digits, shapes, toy, export, tmp_path, capsys, argv, message):
    names = dict(
        CONFIG=digits.config,
        WEIGHTS=digits.weights,
        TEACHER=digits.folder / 'teacher.pth',
        EXPORT=export,
        SHAPES=shapes.config,
        SHAPES_WEIGHTS=shapes.weights,
        TOY=toy.config,
        TOY_WEIGHTS=toy.weights,
    )
    argv = [names.get(word, word) for word in argv.split()]
    code, printed = run(main, [argv[0], *argv[1:], '--out', tmp_path / 'out'], capsys)
    assert code == 2 and message in printed
    assert not list(tmp_path.iterdir())


def test_unwritable(export, tmp_path, capsys):
    (tmp_path / 'file').write_text('in the way')
    code, message = run(main, [export, '--labels', '3', '--out', tmp_path / 'file' / 'out'], capsys)
    assert (
        code == 2
        and 'cannot be written' in message
        and 'name a folder where you may write' in message
    )
