# Copyright (c) mmfgm authors.
"""Prompts and images encoded beforehand, by the encoders of whichever family a model is of."""

from .identity import identify, identity_of

__all__ = ['identify', 'identity_of']
