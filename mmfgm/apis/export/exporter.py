# Copyright (c) mmfgm authors.
"""What the kinds of export have in common."""

import os.path as osp
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmfgm.models import build_generator, has_adapters, merge_adapters
from mmfgm.models.families import DiffusersFamily

from ..artifacts import PIPELINE_FILE
from ..card import find_licence, licence_files, write_card

# the export, in its model card
HERE = 'THIS FOLDER'
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


class Exporter(ABC):
    """Writes one kind of export.

    Whatever is wrong with the request is found in the constructor, before weights are read.

    Args:
        cfg (Config): Of the training.
        dtype (str): Of the written weights, a key of :data:`DTYPES`.

    Attributes:
        kind (str): What the export's description calls it.
    """

    kind: str

    def __init__(self, cfg: Config, dtype: str):
        self.cfg = cfg
        self.dtype = dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @abstractmethod
    def write(self, generator: Any, folder: str, source: dict[str, Any]) -> dict[str, Any]:
        """Write all but the description.

        Args:
            generator (nn.Module): With its weights, which may be changed.
            folder (str): To write into.
            source (dict): Where the generator comes from, see
                :func:`~mmfgm.apis.card.describe_source`.

        Returns:
            dict: ``model``, ``weights_sha256`` and what else the description says of this kind.
        """


class BaseExporter(Exporter):
    """Exports that go with a base: a pipeline in diffusers' folder format.

    Args:
        family (DiffusersFamily): Of the generator's network.
        base (str): Hub id or folder of the pipeline that the generator was distilled from.

    Attributes:
        local (str): Folder of the base.
        bare (nn.Module): The generator's coefficients, without its network.

    Raises:
        UsageError: If the base is not there or is not whole.
    """

    def __init__(self, cfg: Config, dtype: str, family: DiffusersFamily, base: str):
        super().__init__(cfg, dtype)
        self.family = family
        self.base = base
        self.local = family.open(base)
        self.bare: Any = build_generator(cfg.model.get('generator'), nn.Identity())

    @property
    def public_base(self) -> str:
        """A hub id as it is, but of a folder only its name: others do not have it where we do."""
        base = self.base
        return osp.basename(osp.abspath(base)) if osp.isdir(base) else base

    def copy_parts(self, folder: str, but: Collection[str]) -> None:
        """Copy the base, without some of its parts."""
        for name in self.family.parts(self.local):
            if name not in but:
                shutil.copytree(osp.join(self.local, name), osp.join(folder, name))
        shutil.copy(osp.join(self.local, PIPELINE_FILE), folder)

    def write_about(
        self, folder: str, usage: str, source: dict[str, Any], weights: dict[str, str]
    ) -> None:
        """Write the model card, and copy the base's licence."""
        for file in licence_files(self.local):
            shutil.copy(file, folder)
        card = write_card(
            usage,
            source,
            weights,
            self.dtype,
            getattr(self.bare, 'max_nfe', 1),
            self.public_base,
            find_licence(self.local),
        )
        write_text(osp.join(folder, 'README.md'), card)


def merged(generator: nn.Module) -> nn.Module:
    """Without adapters, which are added in float32 at least."""
    return merge_adapters(generator.float()) if has_adapters(generator) else generator


def write_text(path: str, text: str) -> None:
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)
