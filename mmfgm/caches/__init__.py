# Copyright (c) mmfgm authors.
"""Prompts and images encoded beforehand, by the encoders of whichever family a model is of."""

from .encoders import identify, identity_of
from .make import CacheOptions, cache_latents, cache_prompts
from .sources import ImageFiles, read_captions, read_image, read_prompts
from .writer import ShardWriter, keep_good, write_shards

__all__ = [
    'CacheOptions',
    'ImageFiles',
    'ShardWriter',
    'cache_latents',
    'cache_prompts',
    'identify',
    'identity_of',
    'keep_good',
    'read_captions',
    'read_image',
    'read_prompts',
    'write_shards',
]
