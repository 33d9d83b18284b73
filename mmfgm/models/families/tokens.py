# Copyright (c) mmfgm authors.
"""Prompts as one sequence of tokens and a mask, by the one text encoder of a stock pipeline."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmfgm.errors import UsageError

from .base import above
from .text import PipelineText


def drop_padding(embeds: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens ``(L_i, D)`` of each prompt out of ``(N, L, D)``; ``mask (N, L)`` is 1 where there
    is a token, and 0 after the last one. Without a mask there is no padding."""
    if mask is None:
        return list(embeds)
    lengths = mask.bool().sum(1).tolist()
    return [tokens[:length] for tokens, length in zip(embeds, lengths)]


def cut_padding(embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Embeddings ``(N, L', D)`` and mask of the longest prompt's tokens, as a pipeline pads them;
    no mask where there is no padding."""
    if mask is None:
        return embeds, None
    mask = mask.bool()
    longest = int(mask.sum(1).max())
    mask = mask[:, :longest]
    return embeds[:, :longest], None if mask.all() else mask


class TokenEncoder(PipelineText):
    """The text encoder of a pipeline with one of them, whose network does not see padding.

    Conditions are ``prompt_embeds (N, max_length, D)``, zero after a prompt's tokens, and
    ``prompt_mask (N, max_length)`` in the same dtype, which is 1 where there is a token. A cache
    does not store the padding.

    Args:
        pretrained (str): Hub id or local folder of such a pipeline in diffusers' format.
        max_length (int): Tokens of a prompt.
        longest (int): What ``max_length`` may be at most.
        dtype (str): Of weights and embeddings.

    Raises:
        UsageError: If the pipeline is missing, gated or not whole, or ``max_length`` is out of
            range.
    """

    def __init__(self, pretrained: str, max_length: int, longest: int, dtype: str):
        if not 1 <= max_length <= longest:
            raise UsageError(
                f'expected max_length of 1 to {longest}, found {max_length}; choose one of these'
            )
        super().__init__(pretrained, max_length, dtype)

    @abstractmethod
    def embed(self, prompts: list[str]) -> list[Tensor]:
        """The tokens' embeddings ``(L_i, D)`` of each prompt, by the pipeline's ``encode_prompt``;
        at most ``max_length`` each."""

    @abstractmethod
    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt that count towards ``max_length``, before any cut."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens = self.embed(list(prompts))
        embeds = tokens[0].new_zeros(len(tokens), self.max_length, tokens[0].shape[-1])
        padded = pad_sequence(tokens, batch_first=True)
        embeds[:, : padded.shape[1]] = padded
        lengths = torch.tensor([len(item) for item in tokens], device=embeds.device)
        places = torch.arange(self.max_length, device=embeds.device)
        return dict(prompt_embeds=embeds, prompt_mask=(places < lengths[:, None]).to(embeds))

    def too_long(self, prompts: Sequence[str]) -> list[str | None]:
        return above(self.count_tokens(list(prompts)), self.max_length)

    def store(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        parts = super().store(prompts)
        mask = parts['prompt_mask'].bool()
        return dict(
            parts, prompt_embeds=parts['prompt_embeds'][mask], prompt_embeds_tokens=mask.sum(1)
        )
