# Copyright (c) mmfgm authors.
"""What text encoders of stock pipelines have in common."""

from collections.abc import Sequence
from typing import Any

import torch

from mmfgm.errors import UsageError

from .base import PromptEncoder
from .hub import load_or_explain
from .pipelines import read_index

# tokens of a prompt that diffusers' encode_prompt takes at most, for most pipelines
LONGEST = 512


class PipelineText(PromptEncoder):
    """Text encoders of a pipeline, by its own ``encode_prompt``.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int): Tokens of a prompt.
        dtype (str): Of weights and embeddings.
        advice (str): What to do where a part is missing.
        **absent: Other parts of the pipeline that are not loaded, each None.

    Attributes:
        parts (Sequence[str]): Names of its text encoders and tokenizers.
        pipeline (DiffusionPipeline): Without transformer and VAE.

    Raises:
        UsageError: If the pipeline is missing, gated or of another family, or a part is missing.
    """

    parts: Sequence[str] = ('text_encoder', 'tokenizer')

    def __init__(
        self,
        pretrained: str,
        max_length: int,
        dtype: str,
        advice: str = 'download all of it, with hf download OWNER/NAME --local-dir FOLDER',
        **absent: None,
    ):
        index, found = read_index(pretrained)
        family: Any = found  # a DiffusersFamily, as its encoder is this
        theirs = family.prompt_encoder
        if not isinstance(self, theirs):
            raise UsageError(
                f'{pretrained!r} is a {family.title} pipeline, expected one of'
                f' {type(self).__name__}; name another, or take {theirs.__name__}'
            )
        missing = [part for part in self.parts if not (index.get(part) or [None])[0]]
        if missing:
            raise UsageError(f'{pretrained!r} has no {", ".join(missing)}; {advice}')
        options = dict(absent, transformer=None, vae=None)
        self.pipeline = load_or_explain(
            lambda: family.pipeline_type().from_pretrained(
                pretrained, torch_dtype=getattr(torch, dtype), **options
            ),
            pretrained,
            family.title,
        )
        self.max_length = max_length
        self.settings = dict(max_length=max_length)

    @property
    def components(self) -> dict[str, Any]:  # type: ignore[override]
        return {part: getattr(self.pipeline, part) for part in self.parts}

    @property
    def device(self) -> torch.device:
        return self.pipeline.text_encoder.device


def check_length(max_length: int) -> None:
    """Raise a UsageError unless ``encode_prompt`` takes so many tokens."""
    if not 1 <= max_length <= LONGEST:
        raise UsageError(
            f'--max-length must be at least 1 and at most {LONGEST}, but is {max_length}'
        )
