# Copyright (c) mmfgm authors.
"""Models in diffusers' folder format, local or on the hub, loaded with errors that say what to
do."""

import os.path as osp
import re
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from mmfgm.errors import UsageError

from ..weights import check_finite

# what diffusers and the hub raise when weights cannot be had: no such folder, no network, a licence
# not accepted
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError)


def diffusers_module():
    """diffusers, or a UsageError that says how to install it."""
    try:
        import diffusers
    except ImportError as e:
        raise UsageError(
            f'this model needs diffusers ({e}); install it: pip install "mmfgm[sd3]"'
        ) from e
    return diffusers


def hub_module():
    """huggingface_hub, or a UsageError that says how to install it."""
    try:
        import huggingface_hub
    except ImportError as e:
        raise UsageError(
            f'the hub needs huggingface_hub ({e}); install it: pip install "mmfgm[sd3]"'
        ) from e
    return huggingface_hub


def load_pretrained(cls: Any, pretrained: str, subfolder: str, **kwargs) -> nn.Module:
    """``cls.from_pretrained`` of one part of a diffusers pipeline, with errors that say what to do.

    Raises:
        UsageError: If the weights are missing, gated, or not of this class.
        NonFiniteInputError: If they hold inf or nan.
    """
    try:
        found = cls.load_config(
            pretrained, subfolder=subfolder, revision=kwargs.get('revision')
        ).get('_class_name')
        network = (
            cls.from_pretrained(pretrained, subfolder=subfolder, **kwargs)
            if found == cls.__name__
            else None
        )
    except LOADING_ERRORS as e:
        raise UsageError(
            f'{cls.__name__} cannot be loaded from {pretrained!r}, folder {subfolder!r}:'
            f" {str(e)[:400]}\nName a local pipeline folder in diffusers' format, or a hub id"
            ' whose licence you have accepted on its page and that you can download from here (hf'
            ' auth login)'
        ) from e
    if network is None:
        raise UsageError(
            f'{pretrained!r} holds a {found} in {subfolder!r}, not a {cls.__name__}; name a'
            " pipeline with one, in diffusers' format"
        )
    check_finite(network.state_dict(), osp.join(pretrained, subfolder))
    return network


def load_or_explain(load: Callable[[], Any], model: str, kind: str) -> Any:
    """Call a ``from_pretrained`` of ``model`` and say what to do where it fails.

    Args:
        load (Callable): Does it.
        model (str): A folder or an id on the hub.
        kind (str): What ``model`` should be, for the message.

    Raises:
        UsageError: If ``model`` is neither a folder nor a hub id, is gated, cannot be reached, or
            is not whole.
    """
    if osp.isfile(model):
        raise UsageError(
            f"{model!r} is a file, expected a folder in diffusers' format or a hub id; open a"
            ' .safetensors of a whole model with from_single_file of its pipeline in diffusers and'
            ' write the folder with save_pretrained; weights quantised as GGUF cannot be trained'
            ' from, so take the ones that they were made of'
        )
    if not osp.isdir(model) and not re.fullmatch(r'[\w.-]+/[\w.-]+', model):
        raise UsageError(
            f'there is no folder {model!r}, and it is no id on the hub either; expected'
            ' OWNER/NAME, such as stabilityai/stable-diffusion-3-medium-diffusers'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                'ignore', FutureWarning
            )  # only new versions of diffusers call torch_dtype dtype
            return load()
    except Exception as e:  # whatever it is, it is about what is in the folder or on the hub
        chain = ''
        error = e
        while error is not None:
            chain = f'{chain} {type(error).__name__} {error}'
            error = error.__cause__ or error.__context__
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

    # text encoders warn where they cut a prompt, which is how pipelines work
    for library in (logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
