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
from .hub import diffusers_module, load_or_explain, load_pretrained, quiet
from .latents import CachedNullPrompt, KLEncoder, LatentDecoder
from .pipelines import DiffusersFamily, PipelineStep, find, read_index
from .sd3 import SD3, SD3TextEncoder

__all__ = [
    'FAMILIES',
    'SD3',
    'CachedNullPrompt',
    'DiffusersFamily',
    'Family',
    'KLEncoder',
    'LatentDecoder',
    'LatentEncoder',
    'PipelineStep',
    'PromptEncoder',
    'SD3TextEncoder',
    'diffusers_module',
    'family_named',
    'family_of',
    'find',
    'load_or_explain',
    'load_pretrained',
    'quiet',
    'read_index',
    'register_family',
]
