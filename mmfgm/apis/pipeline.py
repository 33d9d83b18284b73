# Copyright (c) mmfgm authors.
import os.path as osp
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from mmfgm.errors import UsageError
from mmfgm.models.families import hub_module, load_or_explain

from .artifacts import read_export
from .inferencer import FGMInferencer
from .values import SEEDS


@dataclass
class OneStepOutput:
    """What a pipeline of diffusers returns: ``images``."""

    images: list[Image.Image]


class OneStepPipeline:
    """An exported generator in diffusers' calling manner; only pure torch is needed for those that
    are no SD3.

    Not a ``DiffusionPipeline``, which would need diffusers for nothing that is used here; the
    export of an SD3 generator is one, and opens with ``StableDiffusion3Pipeline``.

    Examples:
        >>> pipe = OneStepPipeline.from_pretrained('exports/digits')
        >>> images = pipe(labels=[3, 1, 4], seeds=[0, 1, 2]).images
    """

    def __init__(self, inferencer: FGMInferencer):
        self.inferencer = inferencer

    @classmethod
    def from_pretrained(
        cls, folder: str, device: str | None = None, precision: str = 'fp32'
    ) -> 'OneStepPipeline':
        """Open an export of ``tools/export_diffusers.py``.

        Args:
            folder (str): The export, or its id on the hub.
            device (str, optional): Defaults to the GPU, if there is one.
            precision (str): ``'fp32'`` or ``'bf16'`` for compute. Defaults to ``'fp32'``.

        Raises:
            UsageError: If the folder is something else, such as a training checkpoint, or the hub
                does not have it.
        """
        if not osp.exists(folder) and re.fullmatch(r'[\w.-]+/[\w.-]+', folder):
            download = hub_module().snapshot_download
            folder = load_or_explain(lambda: download(folder), folder, 'export of mmfgm')
        read_export(folder)
        return cls(FGMInferencer(folder, device=device, precision=precision))

    def __call__(
        self,
        labels: int | Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        num_images: int | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 8,
        nfe: int | None = None,
        output_type: str = 'pil',
    ) -> OneStepOutput:
        """Generate images.

        Args:
            labels: Classes, for a generator that takes classes.
            prompt: Texts, for one that takes texts.
            num_images: How many, for one that takes neither.
            seeds: One for each image, or the first of them.
            generator (torch.Generator, optional): Draws the seeds, if none are given.
            batch_size (int): Images per network call. Defaults to 8.
            nfe (int, optional): Network calls; defaults to as many as the generator has times.
            output_type (str): ``'pil'``, ``'numpy'`` or ``'tensor'``, see :class:`FGMInferencer`.

        Raises:
            UsageError: If arguments do not fit the generator or each other.
        """
        given = {
            name: value
            for name, value in dict(labels=labels, prompt=prompt, num_images=num_images).items()
            if value is not None
        }
        expected = dict(labels='labels', prompts='prompt', nothing='num_images')[
            self.inferencer.condition
        ]
        if list(given) != [expected]:
            raise UsageError(
                f'this generator takes {expected}, and got {list(given) or "nothing"};'
                f' give {expected}'
            )
        if seeds is not None and generator is not None:
            raise UsageError('seeds and generator both choose the noise; give one of them')
        if generator is not None:
            value = given[expected]
            count = (
                value
                if expected == 'num_images'
                else len(value)
                if not isinstance(value, (int, str))
                else 1
            )
            seeds = torch.randint(
                SEEDS, (count,), generator=generator, device=generator.device
            ).tolist()
        made = self.inferencer(
            given[expected], seeds=seeds, batch_size=batch_size, nfe=nfe, out=output_type
        )
        return OneStepOutput(made['predictions'])
