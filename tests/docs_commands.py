# Copyright (c) mmfgm authors.
"""What tests/test_docs.py does with each command of the docs."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mmengine.registry import DefaultScope
from PIL import Image

from mmfgm.apis import read_config
from mmfgm.registry import MODELS
from tests.conftest import ROOT
from tests.idx_format import write_fashion
from tests.test_apis.conftest import save_checkpoint
from tests.tiny_sd3 import make_tiny_sd3

SD3 = 'stabilityai/stable-diffusion-3-medium-diffusers'


@dataclass(frozen=True)
class Run:
    """A command that is run: what after it makes it short, what must be there before, and what it
    leaves."""

    small: str = ''
    makes: str = ''
    needs: tuple[str | Callable, ...] = ()


@dataclass(frozen=True)
class Serve(Run):
    """A command that serves a page until it is stopped."""


class Parse:
    """A command that is only parsed."""


def quickstart_run(folder):
    """The run that the quickstart would leave."""
    (folder / 'work_dirs/quickstart/digits').mkdir(parents=True)
    (folder / 'work_dirs/quickstart/digits/fgm').symlink_to(folder / 'work_dirs/fgm/digits')


def sd3_inputs(folder):
    """A tiny pipeline, prompts, images and captions where the SD3 commands look for them."""
    make_tiny_sd3(folder / SD3)
    (folder / 'prompts.txt').write_text('a red cat\na blue dog\n')
    (folder / 'images').mkdir()
    for i in range(2):
        Image.fromarray(np.full((20, 20, 3), 80 * i, np.uint8)).save(folder / 'images' / f'{i}.png')
    captions = [json.dumps(dict(file_name=f'{i}.png', text='a house')) for i in range(2)]
    (folder / 'captions.jsonl').write_text('\n'.join(captions))


def sd3_checkpoint(folder):
    """What a training of configs/fgm/sd3_1024.py with the tiny pipeline would keep."""
    cfg = read_config(
        str(ROOT / 'configs/fgm/sd3_1024.py'), dict(latent_size=8, pretrained=str(folder / SD3))
    )
    model = dict(cfg.model, decoder=None, guidance=None, gan=None, teacher=dict(checkpoint=None))
    with DefaultScope.overwrite_default_scope('mmfgm'):
        (folder / 'work_dirs/fgm/sd3_1024').mkdir(parents=True)
        save_checkpoint(MODELS.build(model), folder / 'work_dirs/fgm/sd3_1024/iter_1.pth')
    (folder / 'work_dirs/fgm/sd3_1024/last_checkpoint').write_text('iter_1.pth')


def geneval_results(folder):
    """Results of one image, as GenEval's scripts write them."""
    (folder / 'FOLDER').mkdir()
    row = dict(
        filename='0.png',
        tag='single_object',
        prompt='a photo of a dog',
        correct=True,
        reason='',
        metadata='{}',
        details='{}',
    )
    (folder / 'FOLDER/results.jsonl').write_text(json.dumps(row) + '\n')


TRAIN_TEACHER, TRAIN = (
    f'python tools/train.py configs/{name}/digits.py' for name in ('reflow', 'fgm')
)
SHORT = '--cfg-options train_cfg.max_iters=2 default_hooks.logger.interval=1'
FEW = '--cfg-options evaluations.fd.dataset.num_samples=100'
TINY_SD3 = '--cfg-options latent_size=8'
DIGITS = 'configs/fgm/digits.py work_dirs/fgm/digits'
SD3_RUN = 'configs/fgm/sd3_1024.py work_dirs/fgm/sd3_1024'
MY = 'python -m mmfgm.tools'
SLOW = (
    f'{TRAIN} --work-dir work_dirs/slow_online --cfg-options train_cfg.max_iters=600 '
    'optim_wrapper.online.optimizer.lr=1e-4'
)
COMPARED = 'python tools/report.py work_dirs/fgm/digits --beside work_dirs/slow_online'
CACHE_PROMPTS = 'python tools/cache_prompts.py'
CACHE_LATENTS = f'python tools/cache_latents.py images data/sd3/latents --model {SD3}'
MERGE = 'python tools/merge_checkpoint.py work_dirs/fgm/sd3_1024'
MY_GENERATOR = 'my_generator.py work_dirs/my_project/my_generator'

DRAW = 'python tools/draw_couplings.py configs/reflow'
FEW_PAIRS = '--num-pairs 300 --nfe 2 --batch-size 100'
DRAW_TEACHER = (
    f'{DRAW}/digits.py work_dirs/reflow/digits data/couplings/digits --num-pairs 20000 --nfe 20'
)
TRAIN_2REFLOW = 'python tools/train.py configs/reflow/digits_2reflow.py'
DRAW_2REFLOW = (
    f'{DRAW}/digits_2reflow.py work_dirs/reflow/digits_2reflow data/couplings/digits_2reflow'
    ' --num-pairs 20000 --nfe 10'
)

COMMANDS = {
    DRAW_TEACHER: Run(FEW_PAIRS, 'data/couplings/digits/manifest.json', (TRAIN_TEACHER,)),
    TRAIN_2REFLOW: Run(SHORT, 'work_dirs/reflow/digits_2reflow/iter_2.pth', (DRAW_TEACHER,)),
    DRAW_2REFLOW: Run(FEW_PAIRS, 'data/couplings/digits_2reflow/manifest.json', (TRAIN_2REFLOW,)),
    'python tools/train.py configs/reflow/digits_2reflow_distill.py': Run(
        SHORT, 'work_dirs/reflow/digits_2reflow_distill/iter_2.pth', (DRAW_2REFLOW,)
    ),
    'python tools/train.py configs/reflow/digits_consistency_fm.py': Run(
        SHORT, 'work_dirs/reflow/digits_consistency_fm/iter_2.pth', (TRAIN_TEACHER,)
    ),
    TRAIN_TEACHER: Run(SHORT, 'work_dirs/reflow/digits/iter_2.pth'),
    TRAIN: Run(SHORT, 'work_dirs/fgm/digits/iter_2.pth', (TRAIN_TEACHER,)),
    f'{TRAIN} --resume': Run(SHORT.replace('2', '3'), 'work_dirs/fgm/digits/iter_3.pth', (TRAIN,)),
    f'python tools/test.py {DIGITS} --network teacher generator_ema --nfe 1 10 50 100': Run(
        FEW, 'work_dirs/fgm/digits/test/metrics.json', (TRAIN,)
    ),
    'python tools/test.py configs/reflow/digits.py work_dirs/reflow/digits --nfe 1 10 50 100': Run(
        FEW, 'work_dirs/reflow/digits/test/metrics.json', (TRAIN_TEACHER,)
    ),
    'python tools/train_classifier.py configs/reflow/fashion.py classifier.safetensors': Run(
        '--epochs 1 --cfg-options train_dataloader.dataset.data_root=fashion',
        'classifier.safetensors',
        (lambda folder: write_fashion(folder / 'fashion'),),
    ),
    'python tools/report.py work_dirs/fgm/digits': Run(
        '', 'work_dirs/fgm/digits/report.html', (TRAIN,)
    ),
    'python tools/report.py work_dirs/fgm/digits --curves docs/losses_digits.png': Run(
        '', 'docs/losses_digits.png', (TRAIN,)
    ),
    SLOW: Run(
        'train_cfg.max_iters=2 default_hooks.logger.interval=1',
        'work_dirs/slow_online/iter_2.pth',
        (TRAIN_TEACHER,),
    ),
    f'{COMPARED} --curves docs/losses_compared.png': Run(
        '', 'docs/losses_compared.png', (TRAIN, SLOW)
    ),
    'python tools/compare.py configs/fgm/digits.py configs/fgm/digits_sid.py'
    ' configs/fgm/digits_dmd.py --seeds 0 1': Run(
        f'{SHORT} {FEW.removeprefix("--cfg-options ")} evaluations.fd.interval=2',
        'work_dirs/compare/table.md',
        (TRAIN_TEACHER,),
    ),
    f'python tools/generate.py {DIGITS} --labels 0 1 2 3 --compare 50 --out digits': Run(
        '', 'digits/compare.png', (TRAIN,)
    ),
    'python tools/generate.py work_dirs/quickstart/digits/fgm --labels 0 1 2 3 --compare 50'
    ' --out quickstart_digits': Run('', 'quickstart_digits/compare.png', (TRAIN, quickstart_run)),
    'python tools/browse_dataset.py configs/reflow/shapes_small.py --out shapes.png': Run(
        '', 'shapes.png'
    ),
    f'python tools/demo.py {DIGITS}': Serve(needs=(TRAIN,)),
    'python tools/demo.py mmfgm::fgm/shapes_small.py mmfgm::assets/shapes/generator.safetensors': (
        Serve()
    ),
    f'python tools/export_diffusers.py {DIGITS} exports/digits': Run(
        '', 'exports/digits', (TRAIN,)
    ),
    'tools/dist_train.sh configs/fgm/digits.py 2': Run(
        f'--work-dir work_dirs/two {SHORT}', 'work_dirs/two/iter_2.pth', (TRAIN_TEACHER,)
    ),
    f'tools/dist_test.sh {DIGITS} 2': Run(FEW, 'work_dirs/fgm/digits/test/metrics.json', (TRAIN,)),
    'python tools/train.py configs/reflow/shapes_small.py': Run(
        SHORT, 'work_dirs/reflow/shapes_small/iter_2.pth'
    ),
    'python tools/train.py configs/fgm/shapes_small.py': Run(
        SHORT,
        'work_dirs/fgm/shapes_small/iter_2.pth',
        ('python tools/train.py configs/reflow/shapes_small.py',),
    ),
    f'{MY}.train my_digits.py': Run(
        SHORT, 'work_dirs/my_project/my_digits/iter_2.pth', (TRAIN_TEACHER,)
    ),
    f'{MY}.test my_digits.py work_dirs/my_project/my_digits': Run(
        FEW, 'work_dirs/my_project/my_digits/test/metrics.json', (f'{MY}.train my_digits.py',)
    ),
    f'{MY}.train my_teacher.py': Run(SHORT, 'work_dirs/my_project/my_teacher/iter_2.pth'),
    f'{MY}.train my_generator.py': Run(
        SHORT, 'work_dirs/my_project/my_generator/iter_2.pth', (f'{MY}.train my_teacher.py',)
    ),
    f'{MY}.test {MY_GENERATOR} --network teacher generator_ema': Run(
        FEW, 'work_dirs/my_project/my_generator/test/metrics.json', (f'{MY}.train my_generator.py',)
    ),
    f'{CACHE_PROMPTS} prompts.txt data/sd3/prompts --model {SD3}': Run(
        '', 'data/sd3/prompts', (sd3_inputs,)
    ),
    f'{CACHE_LATENTS} --resolution 1024 --captions captions.jsonl': Run(
        '--resolution 16', 'data/sd3/latents', (sd3_inputs,)
    ),
    f'python tools/check_teacher.py {SD3}': Run('', '', (sd3_inputs,)),
    'python tools/rehearse.py configs/fgm/sd3_1024.py --gpus 8 --gpu H100-80GB': Run(
        TINY_SD3, '', (sd3_inputs,)
    ),
    'python tools/rehearse.py configs/fgm/digits.py --gpu H100-80GB --json digits.json': Run(
        '', 'digits.json'
    ),
    f'python tools/generate.py {SD3_RUN} --prompt "a red cat" --precision auto --out cats': Run(
        TINY_SD3, 'cats/grid.png', (sd3_inputs, sd3_checkpoint)
    ),
    f'python tools/export_diffusers.py {SD3_RUN} exports/sd3_1024': Run(
        TINY_SD3, 'exports/sd3_1024/model_index.json', (sd3_inputs, sd3_checkpoint)
    ),
    f'python tools/export_diffusers.py {SD3_RUN} work_dirs/fgm/sd3_1024/diffusers --dtype bf16': (
        Run(
            TINY_SD3,
            'work_dirs/fgm/sd3_1024/diffusers/model_index.json',
            (sd3_inputs, sd3_checkpoint),
        )
    ),
    f'{MERGE} generator.safetensors --network generator_ema': Run(
        '', 'generator.safetensors', (sd3_inputs, sd3_checkpoint)
    ),
    'python tools/geneval.py prompts data/geneval/prompts.jsonl': Run(
        '', 'data/geneval/prompts.jsonl'
    ),
    f'{CACHE_PROMPTS} data/geneval/prompts.jsonl data/geneval/prompts --model {SD3}': Run(
        '',
        'data/geneval/prompts',
        (sd3_inputs, 'python tools/geneval.py prompts data/geneval/prompts.jsonl'),
    ),
    'python tools/geneval.py summary FOLDER/results.jsonl': Run('', '', (geneval_results,)),
    **{
        command: Parse()
        for command in (
            'bash tools/quickstart.sh',
            'bash tools/quickstart.sh shapes',
            'bash tools/run_tests.sh',
            'bash tools/run_tests.sh -m "not slow"',
            'bash tools/install_mmcv_ops.sh',
            'bash tools/run_tests.sh -k uninterrupted --kills 20',
            'python tools/torture.py work_dirs/fgm/digits',
            (
                'python tools/compare.py configs/fgm/digits*.py --seeds 0 1'
                ' --cfg-options train_cfg.max_iters=1200'
            ),
            'python tools/torture.py work_dirs/fgm/digits --processes 2 --strategy ddp',
            'python tools/torture.py work_dirs/fgm/digits --processes 2 --strategy fsdp2'
            ' --cfg-options strategy.block_types=AdaLNBlock,',
            'python tools/train.py configs/fgm/fashion.py',
            'pip install -e . -c requirements/constraints.txt',
            *(
                f'pip install -e ".[{extra}]" -c requirements/constraints.txt'
                for extra in ('eval', 'sd3', 'sd3,geneval', 'sd3,demo', 'demo')
            ),
            *(
                f'tools/dist_train.sh configs/{name}.py 8'
                for name in ('reflow/cifar10_cond', 'fgm/cifar10_cond', 'fgm/sd3_1024')
            ),
            'GPUS=16 tools/slurm_train.sh PARTITION JOB configs/fgm/digits.py work_dirs/fgm/digits',
            (
                'python tools/test.py configs/reflow/cifar10_uncond.py'
                ' work_dirs/reflow/cifar10_uncond --nfe 10 20 50 100 --solver heun'
            ),
            (
                'python tools/test.py configs/fgm/cifar10_cond.py work_dirs/fgm/cifar10_cond'
                ' --network teacher generator_ema generator_ema_9999 --nfe 10 20 50 100'
            ),
            f'python tools/test.py {SD3_RUN}/iter_20000.pth --evaluation geneval',
            (
                'python tools/report.py work_dirs/fgm/shapes_small --curves docs/losses_shapes.png'
                ' --panels shapes/score_overall shapes/quality_blur shapes/fd loss_ d_accuracy'
                ' watch'
            ),
            (
                f'{DRAW}/cifar10_uncond.py work_dirs/reflow/cifar10_uncond'
                ' data/couplings/cifar10_uncond --num-pairs 4000000 --solver heun'
            ),
            (
                f'python tools/generate.py {SD3_RUN} --prompts configs/fgm/prompts/figure2.txt'
                ' --compare 28 --out figure2'
            ),
            'python tools/cache_latents.py ILSVRC/train data/imagenet256/latents'
            ' --model stabilityai/sd-vae-ft-ema --vae-only --labels folders --resolution 256',
            'tools/dist_train.sh configs/fgm/sit_xl2_256.py 8',
            'python tools/convert_edm.py edm-imagenet-64x64-cond-adm.pkl'
            ' work_dirs/edm/imagenet64_cond.safetensors',
            'python tools/geneval.py score FOLDER',
            'python tools/geneval.py run configs/geneval/sd3.py',
            'python tools/geneval.py run configs/geneval/fgm_sd3.py',
            'tools/dist_geneval.sh 8 run configs/geneval/hyper_sd3.py',
        )
    },
}
