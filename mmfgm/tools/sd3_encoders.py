# Copyright (c) mmfgm authors.
"""Stable Diffusion 3's text encoders and VAE, loaded with errors that say what to do, and
identified."""

import argparse
import hashlib
import json
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from mmfgm.models.text_encoders import SD3TextEncoder, check_sd3, load_or_explain
from mmfgm.processes import on_main

from .caching import DTYPES


def identify(component: Any) -> dict[str, str]:
    """What tells one model or tokenizer from another, whatever the dtype it was loaded in."""
    if not isinstance(component, nn.Module):
        return dict(
            vocabulary=_digest([sorted(component.get_vocab().items()), str(component.pad_token)])
        )
    config = (
        component.config.to_diff_dict()
        if hasattr(component.config, 'to_diff_dict')
        else dict(component.config)
    )
    config = {
        key: value
        for key, value in config.items()
        if not key.startswith('_')
        and key not in ('dtype', 'torch_dtype', 'transformers_version', 'architectures')
    }
    crc = 0
    for value in (
        component.state_dict().values()
    ):  # by order, as names depend on the version of transformers
        crc = zlib.crc32(str(tuple(value.shape)).encode(), crc)
        crc = zlib.crc32(
            value.detach()
            .to('cpu', torch.bfloat16)
            .contiguous()
            .flatten()
            .view(torch.uint8)
            .numpy(),
            crc,
        )
    return {'class': type(component).__name__, 'config': _digest(config), 'weights': f'{crc:08x}'}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]


def load_vae(model: str, device: str) -> nn.Module:
    """SD3's VAE in float32, as half precision costs it accuracy."""
    check_sd3(model)
    from diffusers import AutoencoderKL

    return (
        load_or_explain(lambda: AutoencoderKL.from_pretrained(model, subfolder='vae'), model)
        .float()
        .eval()
        .to(device)
    )


class PromptEncoder:
    """:class:`SD3TextEncoder` for caches: its identity, and what a shard holds, in the dtype that
    is stored.

    Args:
        args (argparse.Namespace): With what :func:`add_caching_arguments` adds.
        device (str): Where to compute.

    Attributes:
        identity (dict), settings (dict), layout (dict): For the manifest.
    """

    def __init__(self, args: argparse.Namespace, device: str):
        self.encoder = SD3TextEncoder(
            args.model, args.max_length, DTYPES[args.dtype], args.without_t5
        ).to(device)
        self.bad = self.encoder.bad
        pipeline = self.encoder.pipeline
        self.identity = on_main(
            lambda: {part: identify(getattr(pipeline, part)) for part in self.encoder.parts}
        )
        self.settings = dict(
            max_length=args.max_length, drop_padding=args.drop_padding, without_t5=args.without_t5
        )
        self.drop_clip, self.drop_t5 = (
            args.drop_padding == 'all',
            args.without_t5 or args.drop_padding != 'none',
        )
        empty = self.encoder.encode([''])
        self.clip_shape = [
            self.encoder.clip_length,
            sum(
                getattr(pipeline, part).config.hidden_size
                for part in ('text_encoder', 'text_encoder_2')
            ),
        ]
        length, channels = empty['prompt_embeds'].shape[1:]
        self.layout = dict(
            clip=self.clip_shape,
            t5=[length - self.clip_shape[0], channels],
            pooled=[empty['pooled_embeds'].shape[1]],
        )

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """A part of a shard: ``clip``, ``t5`` and ``pooled``, and the numbers of tokens where
        padding is dropped."""
        encoded = {name: value.cpu() for name, value in self.encoder.encode(prompts).items()}
        embeds, (length, channels), tensors = (
            encoded['prompt_embeds'],
            self.clip_shape,
            dict(pooled=encoded['pooled_embeds']),
        )
        for name, values, drop in (
            ('clip', embeds[:, :length, :channels], self.drop_clip),
            ('t5', embeds[:, length:], self.drop_t5),
        ):
            if drop:
                absent = name == 't5' and self.settings['without_t5']
                tokens = (
                    [0] * len(prompts)
                    if absent
                    else self.encoder.count_tokens(prompts, name == 'clip')
                )
                tokens = torch.tensor(tokens).clamp(max=values.shape[1])
                values = values[torch.arange(values.shape[1]) < tokens[:, None]]
                tensors[f'{name}_tokens'] = tokens
            tensors[name] = values
        return tensors
