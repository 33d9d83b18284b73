# Copyright (c) mmfgm authors.
"""The export tool as users get it wrong, and what it says then; that exports are exact is
tests/test_apis/test_export.py."""

import json
import shutil

import pytest

from mmfgm.apis import FGMInferencer, OneStepPipeline
from mmfgm.errors import UsageError
from mmfgm.tools.export_diffusers import export_diffusers, main
from tests.conftest import ROOT
from tests.test_apis.conftest import digits, sd3, sd3_folder  # noqa: F401 - fixtures
from tests.test_tools.test_bad_input import run


@pytest.fixture(scope='module')
def names(digits, sd3, sd3_folder, tmp_path_factory):
    """What the words of a command line stand for."""
    folder = tmp_path_factory.mktemp('export')
    export_diffusers([digits.config, digits.weights, str(folder / 'export')])
    shutil.copytree(sd3_folder, folder / 'deeper')
    config = folder / 'deeper' / 'transformer' / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'num_layers': 3}))
    shutil.copytree(sd3_folder, folder / 'half', ignore=lambda *args: ['vae'])
    (folder / 'run').mkdir()
    shutil.copy(digits.weights, folder / 'run' / 'iter_1.pth')
    (folder / 'run' / 'last_checkpoint').write_text('iter_1.pth')
    return dict(
        CONFIG=digits.config,
        WEIGHTS=digits.weights,
        EXPORT=folder / 'export',
        SD3=sd3.config,
        SD3_WEIGHTS=sd3.weights,
        BASE=sd3_folder,
        DEEPER=folder / 'deeper',
        HALF=folder / 'half',
        RUN=folder / 'run',
        REFLOW=ROOT / 'configs/reflow/digits.py',
        TEACHER=digits.folder / 'teacher.pth',
    )


@pytest.mark.parametrize(
    'argv, message',
    [
        ('CONFIG nowhere.pth', "checkpoint 'nowhere.pth' does not exist"),
        ('CONFIG EXPORT', 'is an export already, expected a training checkpoint'),
        (
            'CONFIG BASE',
            'is a diffusers pipeline that is no export of ours, expected a training checkpoint',
        ),
        ('CONFIG TEACHER', 'has no network'),
        (
            'CONFIG WEIGHTS --cfg-options model.network.width=32',
            'is of another architecture than OneStepGenerator',
        ),
        (
            'CONFIG WEIGHTS --network critic',
            "'critic' is no generator of this checkpoint; choose from ['generator_ema',",
        ),
        ('CONFIG WEIGHTS --network teacher', "'teacher' is no generator"),
        ('CONFIG WEIGHTS --base BASE', 'is exported without a base; leave --base out'),
        ('CONFIG WEIGHTS --lora', 'leave --lora out'),
        ('REFLOW WEIGHTS', 'only generators that FGM trains are exported'),
        ('SD3 SD3_WEIGHTS --lora', 'a LoRA file comes from a training with model.lora'),
        (
            'SD3 SD3_WEIGHTS --cfg-options model.generator.c_skip=0.8',
            'c_skip=0.8, but the one step of the stock pipeline keeps 1.0',
        ),
        ('SD3 SD3_WEIGHTS --base DEEPER', 'is of another architecture than the transformer of'),
        (
            'SD3 SD3_WEIGHTS --base nowhere',
            "there is no folder 'nowhere', and it is no id on the hub",
        ),
        ('SD3 SD3_WEIGHTS --base EXPORT', 'is not a whole '),
        ('SD3 SD3_WEIGHTS --base HALF', 'is not whole: vae is missing'),
        ('SD3 SD3_WEIGHTS --max-shard-size big', "max_shard_size='big' is not understood"),
        ('nowhere.py WEIGHTS', "there is no config 'nowhere.py'"),
    ],
)
def test_bad_input(names, tmp_path, capsys, argv, message):
    config, checkpoint, *options = [names.get(word, word) for word in argv.split()]
    code, printed = run(main, [config, checkpoint, tmp_path / 'out', *options], capsys)
    assert code == 2 and message in printed
    # neither a folder nor a part of one
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(names, tmp_path, capsys):
    command = [names['CONFIG'], names['WEIGHTS']]
    export_diffusers([*command, str(tmp_path / 'out')])
    before = (tmp_path / 'out' / 'mmfgm_export.json').read_text()
    code, message = run(main, [*command, tmp_path / 'out', '--dtype', 'bf16'], capsys)
    assert code == 2 and 'exists; replace it with --force' in message
    # a failure with --force leaves the old one too
    code, message = run(
        main, [names['CONFIG'], names['TEACHER'], tmp_path / 'out', '--force'], capsys
    )
    assert code == 2 and (tmp_path / 'out' / 'mmfgm_export.json').read_text() == before
    export_diffusers([*command, str(tmp_path / 'out'), '--dtype', 'bf16', '--force'])
    assert '"dtype": "bf16"' in (tmp_path / 'out' / 'mmfgm_export.json').read_text()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
    code, message = run(main, [*command, tmp_path / 'mine', '--force'], capsys)
    assert (
        code == 2
        and 'was not written by this tool' in message
        and (tmp_path / 'mine' / 'thesis.txt').exists()
    )
    (tmp_path / 'file').write_text('in the way')
    code, message = run(main, [*command, tmp_path / 'file' / 'out'], capsys)
    assert code == 2 and 'name a folder where you may write' in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'mine', 'out']


@pytest.mark.parametrize(
    'word, found',
    [
        ('WEIGHTS', 'a training checkpoint'),
        ('RUN', 'a training checkpoint'),
        ('BASE', 'a diffusers pipeline that is no export'),
        ('nowhere', 'not there'),
    ],
)
def test_a_checkpoint_where_an_export_belongs(names, word, found):
    with pytest.raises(
        UsageError,
        match=f'is {found}.*expected an export.*tools/export_diffusers.py CONFIG CHECKPOINT OUT',
    ):
        OneStepPipeline.from_pretrained(str(names.get(word, word)))
    with pytest.raises(UsageError, match='expected an export'):
        FGMInferencer(None, str(names.get(word, word)))


def test_damaged_exports(names, tmp_path):
    for name, damage, message in (
        ('a', lambda folder: (folder / 'generator.safetensors').unlink(), 'is not whole'),
        ('b', lambda folder: (folder / 'mmfgm_export.json').write_text('{'), 'is damaged'),
    ):
        shutil.copytree(names['EXPORT'], tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(UsageError, match=f'{message}.*export again'):
            OneStepPipeline.from_pretrained(str(tmp_path / name))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(prompt='a cat'), r"takes labels, and got \['prompt'\]"),
        (dict(), 'takes labels, and got nothing'),
        (dict(labels=1, num_images=2), 'takes labels, and got'),
        (dict(labels=10), r'in \[0, 9\], not 10'),
    ],
)
def test_pipeline_arguments(names, arguments, message):
    with pytest.raises(UsageError, match=message):
        OneStepPipeline.from_pretrained(str(names['EXPORT']))(**arguments)
