# Copyright (c) mmfgm authors.
"""Teachers beside their stock pipelines: equal as they are, and found out where something was
changed."""

import json
from pathlib import Path

import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)

from mmfgm.apis import check_teacher
from mmfgm.tools.check_teacher import main
from tests.tiny_flux import make_tiny_flux
from tests.tiny_flux2 import make_tiny_flux2
from tests.tiny_lumina2 import make_tiny_lumina2
from tests.tiny_qwen_image import make_tiny_qwen_image
from tests.tiny_sana import make_tiny_sana
from tests.tiny_sd3 import SD35, make_tiny_sd3
from tests.tiny_z_image import make_tiny_z_image

KINDS = {
    'sd3': make_tiny_sd3,
    'sd3.5': lambda folder: make_tiny_sd3(folder, **SD35),
    'sana': make_tiny_sana,
    'lumina2': make_tiny_lumina2,
    'flux dev': make_tiny_flux,
    'flux schnell': lambda folder: make_tiny_flux(folder, dev=False),
    'flux2 dev': make_tiny_flux2,
    'flux2 klein base': lambda folder: make_tiny_flux2(folder, dev=False),
    'flux2 klein': lambda folder: make_tiny_flux2(folder, dev=False, distilled=True),
    'qwen_image': make_tiny_qwen_image,
    'z_image': make_tiny_z_image,
}
# tiny transformers have few places for tokens
SIZES = {
    'flux2 dev': dict(latent_size=4, max_length=300),
    'flux2 klein base': dict(latent_size=4, max_length=300),
    'flux2 klein': dict(latent_size=4, max_length=300),
    'qwen_image': dict(latent_size=8, max_length=256),
    'z_image': dict(latent_size=8, max_length=96),
    'flux dev': dict(latent_size=8),
    'flux schnell': dict(latent_size=8),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Each kind's folder, made when it is asked for."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = KINDS[kind](tmp_path_factory.mktemp('teachers') / kind)
        return made[kind]

    return folder


def rewrite(folder, name, **changes):
    path = Path(folder) / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize('kind', KINDS)
def test_a_pipeline_as_it_was_published_is_equal(folders, kind):
    found = check_teacher(folders(kind), **SIZES.get(kind, {}))
    assert len(found.differences) == 8 and max(found.differences) < 1e-4
    assert str(found).endswith('equal to 0.001')


@pytest.mark.parametrize(
    'kind, key', [('sd3', 'shift'), ('sana', 'flow_shift'), ('z_image', 'shift')]
)
def test_another_shift_is_found(kind, key, tmp_path):
    folder = KINDS[kind](tmp_path / 'tiny')
    rewrite(folder, 'scheduler/scheduler_config.json', **{key: 1.7})
    found = check_teacher(folder, **SIZES.get(kind, {}))
    assert not found.equal
    assert 'another shift' in str(found) and 'times all steps are equal' in str(found)


def against(self, model_output, *args, **kwargs):
    return original(self, -model_output, *args, **kwargs)


original = FlowMatchEulerDiscreteScheduler.step


def test_a_sign_is_found(folders, monkeypatch):
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, 'step', against)
    found = check_teacher(folders('sd3'))
    assert 'sign: the pipeline goes against our velocity' in str(found)
    assert 'they part at step 1' in str(found)


def test_a_guidance_is_found(folders, monkeypatch):
    from mmfgm.models.families import FAMILIES

    # ours is told another one than the pipeline
    options = FAMILIES['sd3'].stock_options
    monkeypatch.setattr(
        type(FAMILIES['sd3']),
        'stock_options',
        lambda *args: dict(options(*args[1:]), guidance_scale=3.0),
    )
    assert 'mixes 3.00 of the velocity with a prompt and -2.00' in str(
        check_teacher(folders('sd3'), guidance=5.0)
    )


def test_another_time_is_found(folders, monkeypatch):
    """Of the network, as where a pipeline scales it differently."""
    forward = SD3Transformer2DModel.forward

    def late(self, *args, timestep, **kwargs):
        # the pipeline hands it on the grid of its scheduler, in float32
        return forward(self, *args, timestep=timestep * calls.pop(), **kwargs)

    calls = [1.0] * 100 + [0.5] * 8
    monkeypatch.setattr(SD3Transformer2DModel, 'forward', late)
    assert 'is no mixture of our velocities' in str(check_teacher(folders('sd3')))


def test_a_scheduler_of_another_kind_is_replaced_or_refused(tmp_path):
    flow = DPMSolverMultistepScheduler(
        prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0
    )
    found = check_teacher(make_tiny_sana(tmp_path / 'flow', scheduler=flow))
    assert found.equal and 'its DPMSolverMultistepScheduler was replaced by' in str(found)


def run(*argv):
    try:
        main([str(arg) for arg in argv])
    except SystemExit as e:
        return e.code
    return 0


def test_exit_codes(folders, tmp_path, capsys):
    folder = folders('sd3')
    assert run(folder, '--steps', 2) == 0
    assert 'Stable Diffusion 3, latents after each step' in capsys.readouterr().out
    tampered = make_tiny_sd3(tmp_path / 'tampered')
    rewrite(tampered, 'scheduler/scheduler_config.json', shift=1.7)
    assert run(tampered, '--steps', 2) == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    'change, argv, message',
    [
        (dict(_class_name='PixArtAlphaPipeline'), (), 'PixArtAlphaPipeline, expected a '),
        (dict(_class_name='StableDiffusionXLPipeline'), (), 'StableDiffusionXLPipeline, expected'),
        ({}, ('--steps', 0), '--steps must be at least 1'),
    ],
)
def test_bad_input(change, argv, message, tmp_path, capsys):
    folder = make_tiny_sd3(tmp_path / 'tiny')
    rewrite(folder, 'model_index.json', **change)
    assert run(folder, *argv) == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


def test_guidance_that_a_model_does_not_have(folders, capsys):
    assert run(folders('flux schnell'), '--guidance', 4, '--latent-size', 8) == 2
    assert 'leave it out' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['model.safetensors', 'model.gguf'])
def test_a_single_file_is_refused(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b'0')
    assert run(tmp_path / name) == 2
    assert "is a file, expected a folder in diffusers' format" in capsys.readouterr().err
