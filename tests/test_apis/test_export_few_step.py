# Copyright (c) mmfgm authors.
"""Exports of a few-step generator: plain diffusers with its FlowMatchLCMScheduler makes our images
at every prefix of the times, where mmfgm cannot be imported."""

import json
from unittest import mock

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from mmfgm.apis import FGMInferencer, export_generator, read_config
from mmfgm.apis.export.exporter import HERE
from mmfgm.errors import UsageError
from mmfgm.models import Sampler
from tests.test_apis.conftest import make_problem, sd3_config
from tests.test_apis.test_export import PROMPTS, SEEDS, lora_problem, run_stock, to_unit

TIMES = (1.0, 0.9, 0.75, 0.5)


def config_of(folder, **generator):
    settings = dict(_delete_=True, type='FewStepGenerator', **generator)
    return sd3_config(folder) + f"\nmodel['generator'] = dict({settings})\n"


@pytest.mark.slow
def test_stock_diffusers_makes_our_image_at_every_prefix(sd3_folder, tmp_path):
    problem = make_problem(tmp_path, config_of(sd3_folder, times=4, shift=3.0))
    out = str(tmp_path / 'out')
    assert export_generator(read_config(problem.config), problem.weights, out) == 'pipeline'
    z = problem.model.sampler.noise(SEEDS)
    torch.save(z, tmp_path / 'noise')
    counts = (1, 2, 4)
    noise = str(tmp_path / 'noise')
    jobs = [
        [out, 'float32', PROMPTS, noise, str(tmp_path / f'{n}.pt'), dict(sigmas=TIMES[:n])]
        for n in counts
    ]
    run_stock(tmp_path, jobs)
    # the pipeline draws the noise between steps from torch's own state
    torch.manual_seed(5)
    noises = torch.stack([z, *(torch.randn_like(z) for _ in range(3))])
    ours = []
    with mock.patch.object(Sampler, 'noises', lambda self, seeds, count: noises[:count]):
        for n in counts:
            for source in ((problem.config, problem.weights), (out,)):
                inferencer = FGMInferencer(*source)
                assert inferencer.default_sampling().nfe == 4
                made = inferencer(PROMPTS, seeds=SEEDS, nfe=n, out='tensor')['predictions']
                ours.append(to_unit(made))
                theirs = torch.load(tmp_path / f'{n}.pt')
                torch.testing.assert_close(theirs, ours[-1], rtol=0, atol=1e-5)
    assert (ours[0] - ours[2]).abs().max() > 0.01 and (ours[2] - ours[4]).abs().max() > 0.01

    card = (tmp_path / 'out/README.md').read_text()
    assert 'sigmas=[1.0, 0.9, 0.75, 0.5]' in card and '| Network calls per image | 1 to 4 |' in card
    index = json.loads((tmp_path / 'out/model_index.json').read_text())
    assert index['scheduler'] == ['diffusers', 'FlowMatchLCMScheduler']


def test_adapters_alone_with_the_scheduler_that_their_card_names(sd3_folder, tmp_path):
    problem = lora_problem(tmp_path / 'run', sd3_folder, config_of(sd3_folder, times=TIMES))
    out = str(tmp_path / 'out')
    assert export_generator(read_config(problem.config), problem.weights, out, lora=True) == 'lora'
    card = (tmp_path / 'out/README.md').read_text()
    code = card.split('```python\n')[1].split('```')[0]
    opened, *settings = code.splitlines()[1:-2]
    assert '.from_pretrained(' in opened and 'sigmas=[1.0, 0.9, 0.75, 0.5]' in code
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    exec('\n'.join(settings).replace(HERE, out), dict(pipe=pipe))
    inferencer = FGMInferencer(problem.config, problem.weights)
    z = problem.model.sampler.noise(SEEDS)
    torch.manual_seed(5)
    noises = torch.stack([z, *(torch.randn_like(z) for _ in range(3))])
    for n in (1, 4):
        with mock.patch.object(Sampler, 'noises', lambda self, seeds, count: noises[:count]):
            ours = to_unit(inferencer(PROMPTS, seeds=SEEDS, nfe=n, out='tensor')['predictions'])
        torch.manual_seed(5)
        theirs = pipe(
            PROMPTS, latents=z, sigmas=list(TIMES[:n]), guidance_scale=1.0, output_type='pt'
        ).images
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_steps_that_the_scheduler_does_not_make_are_refused(sd3_folder, tmp_path):
    problem = make_problem(tmp_path, config_of(sd3_folder, times=2, c_in=(0.8, 1.0)))
    cfg = read_config(problem.config)
    with pytest.raises(UsageError, match=r"scheduler's own.*c_in=\(0.8, 1.0\)"):
        export_generator(cfg, problem.weights, str(tmp_path / 'out'))
    cfg.model.lora = dict(rank=2, alpha=2, target_modules=('attn.to_q',))
    with pytest.raises(UsageError, match=r"scheduler's own.*c_in=\(0.8, 1.0\)"):
        export_generator(cfg, problem.weights, str(tmp_path / 'out'), lora=True)
    assert not (tmp_path / 'out').exists()
