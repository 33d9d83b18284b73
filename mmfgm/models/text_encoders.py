# Copyright (c) mmfgm authors.
"""Stable Diffusion 3's text encoders, by diffusers' own ``encode_prompt``, with errors that say
what to do."""

import os.path as osp
import re
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.registry import TASK_UTILS


def load_or_explain(load: Callable[[], Any], model: str, kind: str = 'Stable Diffusion 3') -> Any:
    """Call a ``from_pretrained`` of ``model`` and say what to do where it fails.

    Raises:
        UsageError: If ``model`` is neither a folder nor a hub id, is gated, cannot be reached, or
            is not whole.
    """
    if not osp.isdir(model) and not re.fullmatch(r'[\w.-]+/[\w.-]+', model):
        raise UsageError(
            f'there is no folder {model!r}, and it is no id on the hub either; expected is'
            ' OWNER/NAME, such as stabilityai/stable-diffusion-3-medium-diffusers'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                'ignore', FutureWarning
            )  # only new versions of diffusers call torch_dtype dtype
            return load()
    except Exception as e:  # whatever it is, it is about what is in the folder or on the hub
        chain, error = '', e
        while error is not None:
            chain, error = (
                f'{chain} {type(error).__name__} {error}',
                error.__cause__ or error.__context__,
            )
        reason = f'{type(e).__name__}: {str(e).strip()[:300]}'
        if osp.isdir(model):
            raise UsageError(
                f'{model!r} is not a whole {kind} folder of diffusers ({reason}); download all of '
                'it, with hf download OWNER/NAME --local-dir FOLDER'
            ) from e
        if re.search(r'gated|\b40[13]\b', chain, re.IGNORECASE):
            raise UsageError(
                f'{model!r} is gated ({reason}): accept its license at'
                f' https://huggingface.co/{model}, log in with hf auth login, and run again'
            ) from e
        raise UsageError(
            f'{model!r} cannot be had from the hub ({reason}); check its name and the connection,'
            f' or download it where there is one, with hf download {model} --local-dir FOLDER, and'
            ' name the folder'
        ) from e


def quiet() -> None:
    """Keep diffusers and transformers from drawing progress bars, and from warning at each
    batch."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    # CLIP cuts at 77 tokens, which is how SD3 works
    for library in (logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def check_sd3(model: str) -> dict[str, Any]:
    """The ``model_index.json`` of a folder or hub id.

    Raises:
        UsageError: If it is missing, gated, or not of Stable Diffusion 3.
    """
    try:
        from diffusers import StableDiffusion3Pipeline

        quiet()
    except ImportError as e:
        raise UsageError(
            f'this needs diffusers and transformers, which do not import ({e}): pip install '
            '"mmfgm[sd3]"'
        ) from e
    index = dict(load_or_explain(lambda: StableDiffusion3Pipeline.load_config(model), model))
    if not str(index.get('_class_name')).startswith('StableDiffusion3'):
        raise UsageError(
            f'{model!r} is a {index.get("_class_name")}, expected is a StableDiffusion3Pipeline'
        )
    return index


@TASK_UTILS.register_module()
class SD3TextEncoder:
    """The three text encoders of a Stable Diffusion 3 pipeline, or CLIP's two.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int): T5 tokens of a prompt; CLIP sees the first 77 of its own. Defaults to 256.
        dtype (str): Of weights and embeddings. Defaults to ``'float32'``.
        without_t5 (bool): Leave T5 out; its tokens are zero, as in diffusers. Defaults to False.

    Attributes:
        pipeline (StableDiffusion3Pipeline): Without transformer and VAE.
        parts (list[str]): Names of the encoders and tokenizers in it.

    Raises:
        UsageError: See :func:`check_sd3`; if an encoder is missing.
    """

    def __init__(
        self,
        pretrained: str,
        max_length: int = 256,
        dtype: str = 'float32',
        without_t5: bool = False,
    ):
        index = check_sd3(pretrained)
        self.parts = ['text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2']
        self.parts += [] if without_t5 else ['text_encoder_3', 'tokenizer_3']
        missing = [part for part in self.parts if not (index.get(part) or [None])[0]]
        if missing:
            raise UsageError(
                f'{pretrained!r} has no {", ".join(missing)}; download all of it, or leave T5 out '
                'with --without-t5, or without_t5=True in a config'
            )
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        unused = dict(
            transformer=None,
            vae=None,
            **(dict(text_encoder_3=None, tokenizer_3=None) if without_t5 else {}),
        )
        self.pipeline = load_or_explain(
            lambda: StableDiffusion3Pipeline.from_pretrained(
                pretrained, torch_dtype=getattr(torch, dtype), **unused
            ),
            pretrained,
        )
        if without_t5:  # encode_prompt asks the transformer how many channels T5's zeros have
            config = load_or_explain(
                lambda: SD3Transformer2DModel.load_config(pretrained, subfolder='transformer'),
                pretrained,
            )
            self.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        self.max_length, self.without_t5, self.device = max_length, without_t5, torch.device('cpu')
        self.clip_length = self.pipeline.tokenizer_max_length

    def to(self, device) -> 'SD3TextEncoder':
        """Move the encoders, in place."""
        for part in self.parts:
            if part.startswith('text_encoder'):
                getattr(self.pipeline, part).to(device)
        self.device = torch.device(device)
        return self

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

    def bad(self, prompts: Sequence[Any]) -> dict[int, str]:
        """Number to reason of the prompts that are no text, empty, or too long."""
        bad = {
            i: (
                'is empty'
                if isinstance(prompt, str) or prompt is None
                else f'is no text but {prompt!r:.40}'
            )
            for i, prompt in enumerate(prompts)
            if not isinstance(prompt, str) or not prompt.strip()
        }
        name, limit = ('CLIP', self.clip_length) if self.without_t5 else ('T5', self.max_length)
        for first in range(0, len(prompts), 10000):
            part = [
                (i, prompts[i])
                for i in range(first, min(len(prompts), first + 10000))
                if i not in bad
            ]
            for (i, _), tokens in zip(
                part,
                self.count_tokens([prompt for _, prompt in part], self.without_t5) if part else (),
            ):
                if tokens > limit:
                    bad[i] = f'has {tokens} {name} tokens, more than {limit}'
        return dict(sorted(bad.items()))

    def check(self, prompts: Sequence[str]) -> None:
        """Hold prompts against the limit, before any is encoded; the empty prompt is one, meaning
        "no prompt".

        Raises:
            UsageError: Names the first prompt that is no text or too long.
        """
        for i, reason in self.bad(prompts).items():
            if reason != 'is empty':
                raise UsageError(
                    f'prompt {i + 1} of {len(prompts)} {reason}: {str(prompts[i])[:60]!r};'
                    ' shorten it'
                )
