# Copyright (c) mmfgm authors.
"""Prompts of pipelines with one text encoder, whose tokens come with a mask."""

from collections.abc import Sequence
from typing import Any

import torch

from mmfgm.errors import UsageError

from .base import Condition, above
from .text import PipelineText


class MaskedTextEncoder(PipelineText):
    """The text encoder of a pipeline whose ``encode_prompt`` returns embeddings and their mask.

    Networks of such pipelines ignore what the mask hides, so a cache stores prompts without
    padding, which loses nothing.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int, optional): Tokens of a prompt, as the pipeline's ``max_sequence_length``.
            Defaults to the pipeline's own.
        dtype (str): Of weights and embeddings. Defaults to ``'float32'``.

    Attributes:
        title (str): As the family's.
        length (int): The pipeline's own ``max_sequence_length``.
        longest (int): The largest that it takes.

    Raises:
        UsageError: If the pipeline is missing, gated or of another kind, an encoder is missing, or
            ``max_length`` is out of range.
    """

    title: str
    length: int
    longest: int

    def __init__(self, pretrained: str, max_length: int | None = None, dtype: str = 'float32'):
        max_length = self.length if max_length is None else max_length
        if not 2 <= max_length <= self.longest:
            raise UsageError(
                f'expected max_length of {self.title} from 2 to {self.longest}, found {max_length};'
                f' the pipeline takes {self.length}'
            )
        super().__init__(pretrained, max_length, dtype)
        self.settings = dict(max_length=max_length, prefix=self.prefix)

    @property
    def prefix(self) -> str:
        """What the pipeline puts before each prompt, but not before the empty one."""
        return ''

    @property
    def arguments(self) -> dict[str, Any]:
        """More arguments of ``encode_prompt``, as the pipeline's own call gives them."""
        return {}

    def limit(self) -> int:
        """Tokens that the pipeline keeps of a prompt with its prefix."""
        return self.max_length

    def prepare(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the pipeline changes them before it tokenises them."""
        return list(prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds (N, max_length, D)``, and ``prompt_mask (N, max_length)``: 1 at tokens, 0
        at padding behind them; the empty prompt is encoded as the pipeline's negative one."""
        empty = torch.tensor([not prompt for prompt in prompts])
        embeds, mask, null, null_mask = self.pipeline.encode_prompt(
            list(prompts),
            bool(empty.any()),
            negative_prompt='',
            device=self.device,
            max_sequence_length=self.max_length,
            **self.arguments,
        )
        if null is not None:
            embeds[empty], mask[empty] = null[empty], null_mask[empty]
        return dict(prompt_embeds=embeds, prompt_mask=mask.to(embeds.dtype))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones included, before any cut."""
        tokenizer = self.pipeline.tokenizer
        return [
            len(ids) for ids in tokenizer(list(texts), padding=False, truncation=False).input_ids
        ]

    def too_long(self, prompts: Sequence[str]) -> list[str | None]:
        before = self.count_tokens([self.prefix])[0]
        texts = [self.prefix + text for text in self.prepare(prompts)]
        counts = [tokens - before for tokens in self.count_tokens(texts)]
        return above(counts, self.limit() - before)

    # what a cache stores
    def store(self, prompts: Sequence[str]) -> Condition:
        cond = {name: value.cpu() for name, value in self.encode(prompts).items()}
        there = cond['prompt_mask'].bool()
        # where nothing is left, networks attend to the padding
        there |= ~there.any(1, keepdim=True)
        return dict(
            prompt_embeds=cond['prompt_embeds'][there],
            prompt_embeds_tokens=there.sum(1),
            prompt_mask=cond['prompt_mask'],
        )
