# Copyright (c) mmfgm authors.
"""Stable Diffusion 3's text encoders and VAE, loaded with errors that say what to do, and identified."""
import argparse
import hashlib
import json
import os.path as osp
import re
import warnings
import zlib
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError

from .caching import DTYPES, on_main


def _load(load: Callable[[], Any], model: str) -> Any:
    """Call a ``from_pretrained`` and say what to do where it fails."""
    if not osp.isdir(model) and not re.fullmatch(r'[\w.-]+/[\w.-]+', model):
        raise UsageError(f'there is no folder {model!r}, and it is no id on the hub either; expected is OWNER/NAME, such as '
                         'stabilityai/stable-diffusion-3-medium-diffusers')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)   # only new versions of diffusers call torch_dtype dtype
            return load()
    except Exception as e:   # whatever it is, it is about what is in the folder or on the hub
        chain, error = '', e
        while error is not None:
            chain, error = f'{chain} {type(error).__name__} {error}', error.__cause__ or error.__context__
        reason = f'{type(e).__name__}: {str(e).strip()[:300]}'
        if osp.isdir(model):
            raise UsageError(f'{model!r} is not a whole Stable Diffusion 3 folder of diffusers ({reason}); download all of '
                             'it, with hf download OWNER/NAME --local-dir FOLDER') from e
        if re.search(r'gated|\b40[13]\b', chain, re.IGNORECASE):
            raise UsageError(f'{model!r} is gated ({reason}): accept its license at https://huggingface.co/{model}, log in '
                             'with hf auth login, and run again') from e
        raise UsageError(f'{model!r} cannot be had from the hub ({reason}); check its name and the connection, or download '
                         f'it where there is one, with hf download {model} --local-dir FOLDER, and name the folder') from e


def check_sd3(model: str) -> Dict[str, Any]:
    """The ``model_index.json`` of a folder or hub id.

    Raises:
        UsageError: If it is missing, gated, or not of Stable Diffusion 3.
    """
    try:
        from diffusers import StableDiffusion3Pipeline
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging
    except ImportError as e:
        raise UsageError(f'this needs diffusers and transformers, which do not import ({e}): pip install '
                         '"mmfgm[sd3]"') from e
    # each batch would warn that CLIP cuts at 77 tokens, which is how SD3 works
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    index = dict(_load(lambda: StableDiffusion3Pipeline.load_config(model), model))
    if not str(index.get('_class_name')).startswith('StableDiffusion3'):
        raise UsageError(f'{model!r} is a {index.get("_class_name")}, expected is a StableDiffusion3Pipeline')
    return index


def identify(component: Any) -> Dict[str, str]:
    """What tells one model or tokenizer from another, whatever the dtype it was loaded in."""
    if not isinstance(component, nn.Module):
        return dict(vocabulary=_digest([sorted(component.get_vocab().items()), str(component.pad_token)]))
    config = component.config.to_diff_dict() if hasattr(component.config, 'to_diff_dict') else dict(component.config)
    config = {key: value for key, value in config.items() if not key.startswith('_') and key not in
              ('dtype', 'torch_dtype', 'transformers_version', 'architectures')}
    crc = 0
    for value in component.state_dict().values():   # by order, as names depend on the version of transformers
        crc = zlib.crc32(str(tuple(value.shape)).encode(), crc)
        crc = zlib.crc32(value.detach().to('cpu', torch.bfloat16).contiguous().flatten().view(torch.uint8).numpy(), crc)
    return {'class': type(component).__name__, 'config': _digest(config), 'weights': f'{crc:08x}'}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_vae(model: str, device: str) -> nn.Module:
    """SD3's VAE in float32, as half precision costs it accuracy."""
    check_sd3(model)
    from diffusers import AutoencoderKL
    return _load(lambda: AutoencoderKL.from_pretrained(model, subfolder='vae'), model).float().eval().to(device)


class PromptEncoder:
    """SD3's three text encoders, or two, by diffusers' own ``encode_prompt``, computed in the dtype that is stored.

    Args:
        args (argparse.Namespace): With what :func:`add_caching_arguments` adds.
        device (str): Where to compute.

    Attributes:
        identity (dict), settings (dict), layout (dict): For the manifest.
    """

    def __init__(self, args: argparse.Namespace, device: str):
        index = check_sd3(args.model)
        parts = ['text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2']
        parts += [] if args.without_t5 else ['text_encoder_3', 'tokenizer_3']
        missing = [part for part in parts if not (index.get(part) or [None])[0]]
        if missing:
            raise UsageError(f'{args.model!r} has no {", ".join(missing)}; download all of it, or leave T5 out '
                             'with --without-t5')
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
        unused = dict(transformer=None, vae=None, **(dict(text_encoder_3=None, tokenizer_3=None) if args.without_t5 else {}))
        self.pipeline = _load(lambda: StableDiffusion3Pipeline.from_pretrained(
            args.model, torch_dtype=getattr(torch, DTYPES[args.dtype]), **unused), args.model)
        if args.without_t5:   # encode_prompt asks the transformer how many channels T5's zeros have
            config = _load(lambda: SD3Transformer2DModel.load_config(args.model, subfolder='transformer'), args.model)
            self.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        for part in parts:
            if part.startswith('text_encoder'):
                getattr(self.pipeline, part).to(device)
        self.device, self.max_length, self.drop = device, args.max_length, args.drop_padding
        self.identity = on_main(lambda: {part: identify(getattr(self.pipeline, part)) for part in parts})
        self.settings = dict(max_length=args.max_length, drop_padding=args.drop_padding, without_t5=args.without_t5)
        self.drop_t5 = args.without_t5 or self.drop != 'none'
        embeds, pooled = self._encode([''])
        self.clip_shape = [self.pipeline.tokenizer_max_length,
                           sum(getattr(self.pipeline, part).config.hidden_size for part in parts[:4:2])]
        self.layout = dict(clip=self.clip_shape, t5=[embeds.shape[1] - self.clip_shape[0], embeds.shape[2]],
                           pooled=[pooled.shape[1]])

    @torch.no_grad()
    def _encode(self, prompts: List[str]) -> Tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_length)
        return embeds.cpu(), pooled.cpu()

    def _tokens(self, prompts: Sequence[str], clip: bool) -> List[int]:
        """Tokens of each prompt, special ones included, before any cut."""
        tokenizer = self.pipeline.tokenizer if clip else self.pipeline.tokenizer_3
        return [len(ids) for ids in tokenizer(list(prompts), padding=False, truncation=False).input_ids]

    def encode(self, prompts: List[str]) -> Dict[str, Tensor]:
        """A part of a shard: ``clip``, ``t5`` and ``pooled``, and the numbers of tokens where padding is dropped."""
        embeds, pooled = self._encode(prompts)
        (length, channels), tensors = self.clip_shape, dict(pooled=pooled)
        for name, values, drop in (('clip', embeds[:, :length, :channels], self.drop == 'all'),
                                   ('t5', embeds[:, length:], self.drop_t5)):
            if drop:
                absent = name == 't5' and self.settings['without_t5']
                tokens = [0] * len(prompts) if absent else self._tokens(prompts, name == 'clip')
                tokens = torch.tensor(tokens).clamp(max=values.shape[1])
                values = values[torch.arange(values.shape[1]) < tokens[:, None]]
                tensors[f'{name}_tokens'] = tokens
            tensors[name] = values
        return tensors

    def bad(self, prompts: Sequence[Any]) -> Dict[int, str]:
        """Number to reason of the prompts that are no text, empty, or too long."""
        bad = {i: 'is empty' if isinstance(prompt, str) or prompt is None else f'is no text but {prompt!r:.40}'
               for i, prompt in enumerate(prompts) if not isinstance(prompt, str) or not prompt.strip()}
        clip = self.settings['without_t5']
        name, limit = ('CLIP', self.clip_shape[0]) if clip else ('T5', self.max_length)
        for first in range(0, len(prompts), 10000):
            part = [(i, prompts[i]) for i in range(first, min(len(prompts), first + 10000)) if i not in bad]
            for (i, _), tokens in zip(part, self._tokens([prompt for _, prompt in part], clip) if part else ()):
                if tokens > limit:
                    bad[i] = f'has {tokens} {name} tokens, more than {limit}'
        return dict(sorted(bad.items()))
