# Copyright (c) mmfgm authors.
"""The SD3 recipe as a user starts it, with a tiny pipeline in place of the real one: caches,
training, GenEval, resume."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmfgm.evaluation.geneval.folder.layout import read_results
from mmfgm.models import read_state_dict
from mmfgm.tools.cache_prompts import cache_prompts
from tests.conftest import LIMIT, ROOT, run_module, tool_env
from tests.geneval_standin import ROWS, write_prompts
from tests.tiny_sd3 import FACTOR, make_tiny_sd3

PROMPTS = [
    'a red cat',
    'the blue dog on a tree',
    'a large green house',
    'a bird',
    'painting of a small cat and a dog',
]


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """A config with a stand-in detector, and overrides that put tiny folders in the places of the
    real ones."""
    folder = tmp_path_factory.mktemp('sd3')
    model = make_tiny_sd3(folder / 'model')
    (folder / 'prompts.txt').write_text('\n'.join(PROMPTS))
    (folder / 'images').mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            folder / 'images' / f'{i}.png'
        )
    captions = [json.dumps(dict(file_name=f'{i}.png', text=PROMPTS[i])) for i in range(4)]
    (folder / 'captions.jsonl').write_text('\n'.join(captions))
    run_module(
        'mmfgm.tools.cache_prompts',
        folder / 'prompts.txt',
        folder / 'prompts',
        '--model',
        model,
        '--max-length',
        16,
    )
    run_module(
        'mmfgm.tools.cache_latents',
        folder / 'images',
        folder / 'latents',
        '--model',
        model,
        '--resolution',
        8 * FACTOR,
        '--captions',
        folder / 'captions.jsonl',
        '--max-length',
        16,
    )
    rows = write_prompts(folder / 'geneval.jsonl')
    cache_prompts([rows, str(folder / 'geneval'), '--model', model, '--max-length', '32'])
    # custom imports cannot be given on the command line
    (folder / 'sd3.py').write_text(f"""
_base_ = [{str(ROOT / 'configs/fgm/sd3_1024.py')!r}]
custom_imports = dict(imports=['tests.helpers', 'tests.geneval_standin'])
evaluations = dict(geneval=dict(
    interval=2, batch_size=2,
    dataset=dict(path={str(folder / 'geneval')!r}, metadata={rows!r}, samples_per_prompt=3),
    metrics=dict(geneval=dict(detector=dict(_delete_=True, type='StandInDetector'),
                              colors=dict(_delete_=True, type='StandInColors')))))
""")
    return folder / 'sd3.py', [
        f'pretrained={model}',
        'latent_size=8',
        f'prompt_cache={folder / "prompts"}',
        f'latent_cache={folder / "latents"}',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        'train_cfg.accumulation=2',
        # what the config's 'auto' is on the GPUs that it is for
        'strategy.precision=bf16',
        'train_cfg.max_iters=4',
        'default_hooks.checkpoint.interval=2',
        'default_hooks.checkpoint.save_best=geneval/overall',
        'default_hooks.checkpoint.rule=greater',
        'default_hooks.logger.interval=1',
        'default_hooks.samples.interval=4',
        'default_hooks.samples.dataset.num_samples=4',
    ]


def dist_train(work_dir, recipe, *more, codes=(0,), **env):
    config, options = recipe
    command = [
        'bash',
        'tools/dist_train.sh',
        str(config),
        '2',
        '--work-dir',
        str(work_dir),
        *more,
        '--cfg-options',
        *options,
    ]
    path = f'{sys.executable.rsplit("/", 1)[0]}:{tool_env()["PATH"]}'
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=tool_env(PATH=path, **env),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode in codes, f'{result.stdout[-3000:]}\n{result.stderr[-6000:]}'


def verdicts(work_dir, iteration):
    return [
        {**row, 'filename': row['filename'].removeprefix(str(work_dir))}
        for row in read_results(work_dir / 'geneval' / f'iter_{iteration}' / 'results.jsonl')
    ]


@pytest.mark.slow
def test_trains_evaluates_resumes_and_draws(recipe, tmp_path):
    dist_train(tmp_path / 'whole', recipe)
    # stopped by SIGKILL in iteration 3
    kill = [
        'default_hooks.kill.type=KillHook',
        'default_hooks.kill.at=3',
        'default_hooks.kill.when=before',
    ]
    run_module(
        'mmfgm.tools.train',
        recipe[0],
        '--work-dir',
        tmp_path / 'parts',
        '--launcher',
        'pytorch',
        '--cfg-options',
        *recipe[1],
        *kill,
        nproc=2,
        codes=None,
    )
    assert (tmp_path / 'parts' / 'last_checkpoint').read_text().endswith('iter_2.pth')
    # stopped again, in the middle of the evaluation that follows the last iteration
    dist_train(tmp_path / 'parts', recipe, '--resume', codes=(1,), KILL_AFTER='4')
    assert (tmp_path / 'parts' / 'last_checkpoint').read_text().endswith('iter_4.pth')
    dist_train(tmp_path / 'parts', recipe, '--resume')
    whole, parts = (read_state_dict(str(tmp_path / name)) for name in ('whole', 'parts'))
    assert {key.split('.')[0] for key in whole} == {
        'online',
        'discriminator',
        'generator',
        'generator_ema',
    }
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    # latents are decoded: pictures of 16 pixels a side
    picture = next((tmp_path / 'whole').glob('*/vis_data/vis_image/samples_4.png'))
    assert Image.open(picture).size[0] > 100

    # GenEval of the average, at both evaluations; a resumed run takes up what the killed one had
    # judged
    for iteration in (2, 4):
        rows = verdicts(tmp_path / 'whole', iteration)
        assert len(rows) == 3 * len(ROWS) and rows == verdicts(tmp_path / 'parts', iteration)
        assert any(row['correct'] for row in rows) and not all(row['correct'] for row in rows)
    assert verdicts(tmp_path / 'whole', 2) != verdicts(tmp_path / 'whole', 4)
    logs = [path.read_text() for path in sorted((tmp_path / 'parts').glob('*/*.log'))]
    assert [re.findall(r'GenEval: (.*) images are judged already', log) for log in logs] == [
        [],
        ['18 of 18'],
        ['8 of 18'],
    ]
    scores = json.loads((tmp_path / 'whole' / 'geneval' / 'iter_4' / 'metrics.json').read_text())
    assert (
        not scores['comparable']
        and f'geneval/overall: {scores["scores"]["overall"]:.4f}' in logs[-1]
    )
    assert 'not comparable with published scores' in logs[-1]
    assert list((tmp_path / 'whole').glob('best_geneval_overall_iter_*'))
    # the test tool measures the same, up to what sharding and batches do to bf16
    run_module(
        'mmfgm.tools.test',
        recipe[0],
        tmp_path / 'whole',
        '--work-dir',
        tmp_path / 'tested',
        '--cfg-options',
        *recipe[1],
    )
    table = json.loads((tmp_path / 'tested' / 'test' / 'metrics.json').read_text())
    assert abs(table['geneval/overall']['generator_ema']['1'] - scores['scores']['overall']) < 0.2
    assert (
        tmp_path / 'tested' / 'test' / 'geneval' / 'generator_ema_1_nfe' / 'results.jsonl'
    ).is_file()
    assert len(list((tmp_path / 'whole').glob('*/vis_data/vis_image/geneval_*_4.png'))) == len(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    'wrong, message',
    [
        (
            'train_dataloader.dataset.real.latent_shape=[16,16,16]',
            'latent_shape is (16, 16, 16), but the latents of',
        ),
        ('model.network.pretrained=/nowhere/sd3', 'cannot be loaded from'),
        (
            'model.gan.feature_layer=7',
            'feature_layer=7 is out of range: this network has the layers 1 to 2',
        ),
        ('model.guidance.null.path=/nowhere/prompts', '/nowhere/prompts'),
        (
            'evaluations.geneval.dataset.metadata=None',
            'holds 6 other prompts than those of GenEval (553)',
        ),
    ],
)
def test_bad_input(recipe, tmp_path, wrong, message):
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = [{str(recipe[0])!r}]\nstrategy = dict(_delete_=True,'
        ' type="SingleDeviceStrategy")\n'
    )
    result = run_module(
        'mmfgm.tools.train',
        config,
        '--work-dir',
        tmp_path / 'out',
        '--cfg-options',
        *recipe[1],
        wrong,
        codes=(2,),
    )
    assert message in result.stderr and 'Traceback' not in result.stderr
