# Copyright (c) mmfgm authors.
"""Inf and nan are found where they come in: in weights, in training data, in samples."""

import pytest
import torch
from safetensors.torch import save_file

from mmfgm.datasets import TensorDataset, WithReal, check_finite_batch
from mmfgm.errors import EXIT_NON_FINITE, NonFiniteError, NonFiniteInputError
from mmfgm.models import Sampler, Sampling, load_network
from mmfgm.processes import is_finite
from mmfgm.tools import generate as generate_tool
from mmfgm.tools import merge_checkpoint as merge_tool
from mmfgm.tools import test as test_tool
from mmfgm.tools import train as train_tool
from tests.test_apis.conftest import digits  # noqa: F401 - a fixture
from tests.test_tools.test_bad_input import run

BAD = [float('nan'), float('inf'), -float('inf')]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('bad', BAD)
def test_one_bad_number_anywhere_is_found(dtype, bad):
    for at in (0, 501, 1002):
        values = torch.randn(1003).to(dtype)
        assert is_finite(values)
        values[at] = bad
        assert not is_finite(values)


def test_what_has_no_inf_is_finite():
    assert is_finite(torch.empty(0)) and is_finite(torch.empty(3, device='meta'))
    assert is_finite(torch.tensor([2**62])) and is_finite(torch.tensor([True, False]))
    largest = torch.full((3,), torch.finfo(torch.float32).max)
    assert is_finite(torch.cat([largest, -largest]))


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_name_the_tensor_and_stay_out(tmp_path, suffix, bad):
    network = torch.nn.Linear(2, 3)
    before = network.weight.clone()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    state['bias'][1] = bad
    file = str(tmp_path / f'weights{suffix}')
    (save_file if suffix == '.safetensors' else torch.save)(state, file)
    with pytest.raises(NonFiniteInputError, match="inf or nan in 1 of 2 tensors, such as 'bias'"):
        load_network(network, file)
    assert torch.equal(network.weight, before)


class Scale(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, z, embeds=0.0):
        return self.weight * z + embeds


@pytest.mark.parametrize(
    'weight, embeds, decoder, cause',
    [
        (float('nan'), 0.0, None, r"Its weights hold them \('weight'\)"),
        (1.0, float('inf'), None, r'Its conditions hold them \(embeds\)'),
        (3e38, 0.0, None, 'became too large on the way'),
        (1.0, 0.0, lambda samples: samples / 0, 'decoded to samples with inf or nan'),
    ],
)
def test_samples_say_what_they_come_from(weight, embeds, decoder, cause):
    sampler = Sampler(dict(net=Scale(weight)), (64,), dict(net=1), decoder=decoder)
    batch = dict(seed=[5, 9], cond=dict(embeds=torch.tensor([[0.0], [embeds]])))
    with pytest.raises(NonFiniteError, match=cause) as found:
        sampler.sample(batch, Sampling('net'))
    assert '9]' in str(found.value)
    if embeds:
        assert '1 of 2, of the seeds [9]' in str(found.value)


def test_data_names_the_items():
    x_0 = torch.zeros(10, 2)
    x_0[7, 1] = float('nan')
    labels = torch.zeros(10, dtype=torch.int64)
    dataset = TensorDataset(x_0, labels=labels)
    check_finite_batch(dataset.__getitems__([1, 2]), dataset)
    with pytest.raises(NonFiniteInputError, match='x_0 .* 1 of 3 items of a batch: item 7'):
        check_finite_batch(dataset.__getitems__([3, 7, 1]), dataset)
    embeds = torch.zeros(10)
    embeds[4] = float('inf')
    dataset = TensorDataset(torch.zeros(10, 2), embeds=embeds)
    with pytest.raises(NonFiniteInputError, match='embeds of .* item 4'):
        check_finite_batch(dataset.__getitems__([4, 5]), dataset)


def test_real_samples_name_their_own_items(monkeypatch):
    x_0 = torch.zeros(5, 2)
    x_0[3] = float('nan')
    parts = dict(a=TensorDataset(torch.zeros(10, 2)), b=TensorDataset(x_0))
    monkeypatch.setattr('mmfgm.datasets.base.DATASETS.build', parts.get)
    dataset = WithReal('a', 'b')
    with pytest.raises(NonFiniteInputError, match=r'WithReal, real.*item 3 of the real samples'):
        check_finite_batch(dataset.__getitems__([2, 3]), dataset)


@pytest.fixture(scope='module')
def poisoned(digits, tmp_path_factory):
    """A training's checkpoint in which the generator's average has one inf."""
    content = torch.load(digits.weights, weights_only=True)
    key = next(key for key in content['state_dict'] if key.startswith('generator_ema.'))
    content['state_dict'][key].view(-1)[3] = float('inf')
    file = str(tmp_path_factory.mktemp('poisoned') / 'iter_8.pth')
    torch.save(content, file)
    return file


@pytest.mark.parametrize('tool', ['generate', 'compare', 'test', 'merge'])
def test_tools_refuse_the_checkpoint(tool, digits, poisoned, tmp_path, capsys):
    out = tmp_path / 'out'
    labels = ['--labels', '3', '--out', out]
    main, argv = {
        'generate': (generate_tool.main, labels),
        'compare': (generate_tool.main, [*labels, '--compare', '2']),
        'test': (test_tool.main, ['--work-dir', out]),
        'merge': (merge_tool.main, [tmp_path / 'out.safetensors', '--network', 'generator_ema']),
    }[tool]
    first = [poisoned] if tool == 'merge' else [digits.config, poisoned]
    code, message = run(main, [*first, *argv], capsys)
    assert code == EXIT_NON_FINITE
    assert poisoned in message and 'inf or nan' in message and 'earlier checkpoint' in message
    assert not list(tmp_path.rglob('*.png')) and not list(tmp_path.glob('*.safetensors'))


def test_an_inf_teacher_is_found_before_training(tiny, tmp_path, capsys):
    teacher = str(tmp_path / 'teacher.pth')
    content = torch.load(tiny / 'teacher_run' / 'iter_30.pth', weights_only=True)
    state = content['state_dict']
    state['network_ema.input.weight'][0, 0] = float('inf')
    torch.save(dict(state_dict=state), teacher)
    code, message = run(
        train_tool.main,
        [
            tiny / 'fgm.py',
            '--work-dir',
            tmp_path / 'run',
            '--cfg-options',
            f'model.teacher.checkpoint={teacher}',
        ],
        capsys,
    )
    assert code == EXIT_NON_FINITE and teacher in message and "'input.weight'" in message
    assert not list((tmp_path / 'run').glob('iter_*'))
