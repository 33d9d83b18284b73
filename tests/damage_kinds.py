# Copyright (c) mmfgm authors.
"""The kinds of file that we store, each with a way to make one, to read it, and to tell whether
what was read is right. ``tests/test_fuzz.py`` and ``tests/damage_campaign.py`` damage them."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from safetensors.torch import save

from mmfgm.apis import FGMInferencer
from mmfgm.apis.export import export_generator
from mmfgm.engine.checkpoint import encode_message_hub, save_directory, save_file
from mmfgm.engine.hooks.rng import get_rng_state
from mmfgm.models import (
    AdaLNMLP,
    OneStepGenerator,
    read_edm_pickle,
    read_pickle,
    read_state_dict,
    safetensors_metadata,
)
from mmfgm.models.checksums import CHECKSUMS
from mmfgm.version import __version__

from .damage import damage, outcome
from .test_models.test_edm_checkpoint import CONDITIONAL, Persistent, dump, random_state, tree

NETWORK = dict(
    type='AdaLNMLP', event_shape=(1, 8, 8), width=16, depth=1, embed_dim=16, num_classes=10
)


@dataclass
class Kind:
    """A kind of file.

    Args:
        make: Write one into an empty folder.
        read: Read all of it, as a user would; the content is compared with that of the whole one.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]


def network() -> AdaLNMLP:
    torch.manual_seed(0)
    found = AdaLNMLP(**{key: value for key, value in NETWORK.items() if key != 'type'})
    for p in found.parameters():
        torch.nn.init.normal_(p)
    return found


def training_state() -> tuple[dict, dict]:
    """What a run saves: the tensors, and everything else."""
    generator = OneStepGenerator(network())
    optimizers = {}
    for name in ('generator', 'online'):
        optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
        for p in generator.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizers[name] = optimizer.state_dict()
    state = {
        f'{name}.{key}': value.detach().clone()
        for name in ('generator', 'generator_ema', 'online')
        for key, value in generator.state_dict().items()
    }
    history = HistoryBuffer(np.arange(50) / 7, np.ones(50), 1000)
    hub = dict(
        log_scalars={'train/loss': history},
        runtime_info=dict(iter=49, epoch=0),
        resumed_keys={'train/loss': True},
    )
    extras = dict(
        meta={'epoch': 0, 'iter': 50, 'seed': 0, 'mmfgm': __version__, CHECKSUMS: True},
        message_hub=encode_message_hub(hub),
        rng=[get_rng_state()],
        param_schedulers=dict(generator=[dict(last_step=50, base_values=[1e-3])]),
    )
    return dict(state_dict=state, optimizer=optimizers), extras


def _make_pth(folder: Path) -> None:
    tensors, extras = training_state()
    save_file({**extras, **tensors}, str(folder / 'iter_50.pth'))


def _make_sharded(folder: Path) -> None:
    tensors, extras = training_state()
    save_directory(tensors, extras, str(folder / 'iter_50.pth'))


def _read_sharded(folder: Path) -> Any:
    path = folder / 'iter_50.pth'
    extras = read_pickle(str(path / 'extras.pth'))
    return read_state_dict(str(path)), {**extras, 'shards': None, CHECKSUMS: None}


def _make_merged(folder: Path) -> None:
    tensors = network().state_dict()
    (folder / 'merged.safetensors').write_bytes(
        save(tensors, safetensors_metadata(tensors, network='generator_ema'))
    )


def _make_export(folder: Path) -> None:
    _make_pth(folder)
    cfg = Config(dict(model=dict(type='FGM', network=NETWORK, ema=dict(decays=[0.9]))))
    export_generator(cfg, str(folder / 'iter_50.pth'), str(folder / 'out'), network='generator')
    (folder / 'iter_50.pth').unlink()
    # nobody reads the card
    (folder / 'out' / 'README.md').unlink()


def _read_export(folder: Path) -> Any:
    inferencer = FGMInferencer(str(folder / 'out'), device='cpu')
    return inferencer([3, 1], seeds=0, out='tensor')['predictions']


def _make_edm(folder: Path) -> None:
    state = {f'model.{name}': value for name, value in random_state(CONDITIONAL).items()}
    ema = tree(
        state,
        'EDMPrecond',
        sigma_data=0.5,
        _init_kwargs=dict(model_type='SongUNet', dropout=0.13),
    )
    ema.state['_modules']['model'].class_name = 'SongUNet'
    content = dump(dict(ema=ema, loss_fn=Persistent('EDMLoss')))
    (folder / 'network.pkl').write_bytes(content)
    # as a user has it from where the file was published
    (folder / 'sha256').write_text(hashlib.sha256(content).hexdigest())


KINDS: dict[str, Kind] = {
    'checkpoint (.pth)': Kind(_make_pth, lambda f: read_pickle(str(f / 'iter_50.pth'))),
    'one network of a .pth': Kind(
        _make_pth, lambda f: read_state_dict(str(f / 'iter_50.pth'), network='generator_ema')
    ),
    'sharded checkpoint': Kind(_make_sharded, _read_sharded),
    'merged network (.safetensors)': Kind(
        _make_merged, lambda f: read_state_dict(str(f / 'merged.safetensors'))
    ),
    'export': Kind(_make_export, _read_export),
    'EDM pickle, with its SHA-256': Kind(
        _make_edm,
        lambda f: read_edm_pickle(str(f / 'network.pkl'), sha256=(f / 'sha256').read_text()),
    ),
}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through nested containers."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


class Sample:
    """A whole one of a kind, to be damaged and restored as often as one likes."""

    def __init__(self, kind: str, folder: Path):
        self.kind = KINDS[kind]
        self.folder = folder
        folder.mkdir()
        self.kind.make(folder)
        self.right = self.kind.read(folder)
        self.whole = {
            path: path.read_bytes()
            for path in sorted(folder.rglob('*'))
            if path.is_file() and path.name != 'sha256'
        }

    def try_damage(self, damage_kind: str, seed: int) -> str:
        """Damage one of its files and read it; see :func:`~tests.damage.outcome`."""
        # a file is as likely to be hit as it is large, but a small one now and then too
        rng = random.Random(f'file {damage_kind} {seed}')
        paths = list(self.whole)
        weights = [1 if seed % 2 else len(self.whole[path]) for path in paths]
        (path,) = rng.choices(paths, weights)
        path.write_bytes(damage(self.whole[path], damage_kind, seed))
        try:
            return outcome(
                lambda: self.kind.read(self.folder), lambda found: same(found, self.right)
            )
        finally:
            path.write_bytes(self.whole[path])
