# Copyright (c) mmfgm authors.
"""Pre-trained models that users own, one family a file or folder; see :mod:`.base` for the next."""

from .base import (
    FAMILIES,
    Family,
    LatentEncoder,
    PromptEncoder,
    family_named,
    family_of,
    register_family,
)
from .flux import Flux, FluxTextEncoder
from .flux2 import Flux2, Flux2Decoder, Flux2TextEncoder
from .hub import diffusers_module, hub_module, load_or_explain, load_pretrained, quiet
from .latents import CachedNullPrompt, KLEncoder, LatentDecoder
from .lumina2 import Lumina2, Lumina2TextEncoder
from .pipelines import DiffusersFamily, PipelineStep, find, read_index
from .qwen_image import QwenImage, QwenImageTextEncoder
from .sana import Sana, SanaTextEncoder
from .sd3 import SD3, SD3TextEncoder
from .z_image import ZImage, ZImageTextEncoder

__all__ = [
    'FAMILIES',
    'SD3',
    'CachedNullPrompt',
    'DiffusersFamily',
    'Family',
    'Flux',
    'Flux2',
    'Flux2Decoder',
    'Flux2TextEncoder',
    'FluxTextEncoder',
    'KLEncoder',
    'LatentDecoder',
    'LatentEncoder',
    'Lumina2',
    'Lumina2TextEncoder',
    'PipelineStep',
    'PromptEncoder',
    'QwenImage',
    'QwenImageTextEncoder',
    'SD3TextEncoder',
    'Sana',
    'SanaTextEncoder',
    'ZImage',
    'ZImageTextEncoder',
    'diffusers_module',
    'family_named',
    'family_of',
    'find',
    'hub_module',
    'load_or_explain',
    'load_pretrained',
    'quiet',
    'read_index',
    'register_family',
]
