# Copyright (c) mmfgm authors.
"""Stable Diffusion 3's text encoders, by diffusers' own ``encode_prompt``, with errors that say
what to do."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.registry import TASK_UTILS

from ..base import above
from ..hub import diffusers_module, load_or_explain
from ..text import PipelineText, check_length

TITLE = 'Stable Diffusion 3'
PADDING = ('none', 't5', 'all')


@TASK_UTILS.register_module()
class SD3TextEncoder(PipelineText):
    """The three text encoders of a Stable Diffusion 3 pipeline, or CLIP's two.

    A cache gets the parts ``clip``, ``t5`` and ``pooled``: CLIP's channels are stored without the
    zeros that diffusers appends to reach T5's, and padding may be dropped.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int): T5 tokens of a prompt; CLIP sees the first 77 of its own. Defaults to 256.
        dtype (str): Of weights and embeddings. Defaults to ``'float32'``.
        without_t5 (bool): Leave T5 out; its tokens are zero, as in diffusers. Defaults to False.
        drop_padding (str): Whose padding tokens a cache does not store: ``'none'``, ``'t5'`` or
            ``'all'``. Defaults to ``'none'``.

    Attributes:
        pipeline (StableDiffusion3Pipeline): Without transformer and VAE.
        parts (list[str]): Names of the encoders and tokenizers in it that are used.

    Raises:
        UsageError: If the pipeline is missing, gated or of another kind, an encoder is missing, or
            an argument is out of range.
    """

    def __init__(
        self,
        pretrained: str,
        max_length: int = 256,
        dtype: str = 'float32',
        without_t5: bool = False,
        drop_padding: str = 'none',
    ):
        check_length(max_length)
        if drop_padding not in PADDING:
            raise UsageError(f'drop_padding must be one of {PADDING}, but is {drop_padding!r}')
        self.parts = ['text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2']
        t5 = ['text_encoder_3', 'tokenizer_3']
        self.parts += [] if without_t5 else t5
        advice = (
            'download all of it, or leave T5 out with --without-t5, or without_t5=True in a config'
        )
        absent = dict.fromkeys(t5) if without_t5 else {}
        super().__init__(pretrained, max_length, dtype, advice, **absent)
        if without_t5:  # encode_prompt asks the transformer how many channels T5's zeros have
            config = load_or_explain(
                lambda: diffusers_module().SD3Transformer2DModel.load_config(
                    pretrained, subfolder='transformer'
                ),
                pretrained,
                TITLE,
            )
            self.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        self.without_t5 = without_t5
        self.clip_length = self.pipeline.tokenizer_max_length
        self.settings = dict(
            max_length=max_length, drop_padding=drop_padding, without_t5=without_t5
        )
        self.drop_clip = drop_padding == 'all'
        self.drop_t5 = without_t5 or drop_padding != 'none'

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds (N, 77 + max_length, D)`` and ``pooled_embeds (N, P)``, on the encoders'
        device."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_length,
        )
        return dict(prompt_embeds=embeds, pooled_embeds=pooled)

    def count_tokens(self, prompts: Sequence[str], clip: bool) -> list[int]:
        """Tokens of each prompt in CLIP's or T5's eyes, special ones included, before any cut."""
        tokenizer = self.pipeline.tokenizer if clip else self.pipeline.tokenizer_3
        return [
            len(ids) for ids in tokenizer(list(prompts), padding=False, truncation=False).input_ids
        ]

    def too_long(self, prompts: Sequence[str]) -> list[str | None]:
        counts = self.count_tokens(prompts, clip=self.without_t5)
        if self.without_t5:
            return above(counts, self.clip_length, 'CLIP tokens')
        return above(counts, self.max_length, 'T5 tokens')

    # what a cache stores
    @property
    def conditions(self) -> dict[str, list[str]]:
        return dict(prompt_embeds=['clip', 't5'], pooled_embeds=['pooled'])

    @property
    def clip_shape(self) -> list[int]:
        """Tokens and channels of CLIP's part, without the zeros that reach T5's channels."""
        encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        return [self.clip_length, sum(encoder.config.hidden_size for encoder in encoders)]

    @property
    def layout(self) -> dict[str, list[int]]:
        empty = self.encode([''])
        length, channels = empty['prompt_embeds'].shape[1:]
        return dict(
            clip=self.clip_shape,
            t5=[length - self.clip_length, channels],
            pooled=[empty['pooled_embeds'].shape[1]],
        )

    def store(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoded = {name: value.cpu() for name, value in self.encode(prompts).items()}
        embeds = encoded['prompt_embeds']
        tensors = dict(pooled=encoded['pooled_embeds'])
        length, channels = self.clip_shape
        for name, values, drop in (
            ('clip', embeds[:, :length, :channels], self.drop_clip),
            ('t5', embeds[:, length:], self.drop_t5),
        ):
            if drop:
                absent = name == 't5' and self.without_t5
                counts = [0] * len(prompts)
                if not absent:
                    counts = self.count_tokens(prompts, name == 'clip')
                tokens = torch.tensor(counts).clamp(max=values.shape[1])
                values = values[torch.arange(values.shape[1]) < tokens[:, None]]
                tensors[f'{name}_tokens'] = tokens
            tensors[name] = values
        return tensors
