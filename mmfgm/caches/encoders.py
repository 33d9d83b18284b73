# Copyright (c) mmfgm authors.
"""What computes the content of a cache, and what identifies it."""

import hashlib
import json
import zlib
from typing import Any

import torch
from torch import nn

from mmfgm.models.families import LatentEncoder, PromptEncoder


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


def identity_of(encoder: PromptEncoder | LatentEncoder) -> dict[str, dict[str, str]]:
    """What tells the models and tokenizers of an encoder from others, by their names in it."""
    return {name: identify(component) for name, component in encoder.components.items()}
