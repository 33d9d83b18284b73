# Copyright (c) mmfgm authors.
"""Networks of other libraries that judge images, from local files or a download."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.models import check_finite, read_pickle

from .features import to_uint8

# images of one call: at 1024 pixels a processor's copies take gigabytes for a whole batch
PART = 64


def load_judge(
    who: str, pretrained: str, kind: str, cls: str, processor: str | None = None
) -> tuple[torch.nn.Module, Any]:
    """A network in float32 on the CPU that will not be trained, and what prepares its inputs.

    Args:
        who (str): Who needs it, for messages.
        pretrained (str): Local folder in the format of transformers, or hub id.
        kind (str): Its ``model_type``.
        cls (str): Name of its class in transformers.
        processor (str, optional): Folder or hub id of the processor. Defaults to ``pretrained``.

    Raises:
        UsageError: If transformers is missing, or the weights cannot be had, are of another
            architecture or lack tensors.
        NonFiniteInputError: If they hold inf or nan.
    """
    try:
        import transformers
    except ImportError as e:
        raise UsageError(
            f'{who} needs transformers ({e}); install it: pip install "mmfgm[sd3]"'
        ) from e
    try:
        found = transformers.AutoConfig.from_pretrained(pretrained).model_type
        if found == kind:
            network, info = getattr(transformers, cls).from_pretrained(
                pretrained, dtype=torch.float32, output_loading_info=True
            )
            prepare = (
                transformers.AutoProcessor if kind == 'clip' else transformers.AutoImageProcessor
            ).from_pretrained(processor or pretrained)
    # no such name, gated, no network, or files that are damaged or of other shapes
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        raise UsageError(
            f'{who} cannot load {pretrained!r}: {str(e).strip()[:400]}\nName a local folder in the'
            ' format of transformers, processor included, or a hub id that can be downloaded from'
            ' here (hf download OWNER/NAME --local-dir FOLDER makes a folder of it)'
        ) from e
    if found != kind:
        raise UsageError(
            f'{who} needs a {cls}, but {pretrained!r} holds a model of type {found!r}; name'
            f' weights of type {kind!r}'
        )
    if lacking := sorted(info['missing_keys']):
        raise UsageError(
            f'{pretrained!r} lacks {len(lacking)} tensors of a {cls}, such as {lacking[0]!r}, which'
            f' would be random; name whole weights for {who}'
        )
    check_finite(network.state_dict(), pretrained)
    return network.eval().requires_grad_(False), prepare


def load_lpips(alexnet: str | None = None) -> torch.nn.Module:
    """LPIPS on AlexNet as its authors calibrated it, in float32 on the CPU.

    Args:
        alexnet (str, optional): File of torchvision's AlexNet weights. Defaults to a download.

    Raises:
        UsageError: If lpips is missing, or the weights cannot be had or are of another network.
        NonFiniteInputError: If they hold inf or nan.
    """
    try:
        from lpips import LPIPS
    except ImportError as e:
        raise UsageError(
            f'PairwiseLPIPS needs lpips ({e}); install it: pip install "mmfgm[eval]"'
        ) from e
    from torchvision.models import AlexNet_Weights

    fix = f'name a file of them by alexnet, which is to be had at {AlexNet_Weights.DEFAULT.url}'
    try:
        state = (
            read_pickle(alexnet)
            if alexnet
            else AlexNet_Weights.DEFAULT.get_state_dict(progress=True, check_hash=True)
        )
    except OSError as e:
        raise UsageError(
            f"PairwiseLPIPS cannot have torchvision's AlexNet weights ({e}); {fix}"
        ) from e
    with warnings.catch_warnings():
        # its way of asking torchvision for a random network is an old one
        warnings.simplefilter('ignore')
        network = LPIPS(net='alex', pnet_rand=True, verbose=False)
    convolutions = {
        f'{name}.{part}': tuple(value.shape)
        for name, layer in network.net.named_modules()
        if not list(layer.children())
        for part, value in layer.named_parameters()
    }
    # slice2.3.weight is AlexNet's features.3.weight
    given = {name: f'features.{name.partition(".")[2]}' for name in convolutions}
    for name, shape in convolutions.items():
        value = state.get(given[name])
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else 'nothing'
        if found != shape:
            raise UsageError(
                f'{alexnet!r}: expected {given[name]} of shape {shape}, found {found}; {fix}'
            )
    trunk = {name: state[key] for name, key in given.items()}
    check_finite(trunk, alexnet or 'AlexNet')
    network.net.load_state_dict(trunk)
    return network.requires_grad_(False)


def rgb_parts(who: str, samples: Tensor) -> Iterator[list[Tensor]]:
    """Images ``(3, H, W)`` uint8 on the CPU, in lists of at most 64.

    Raises:
        UsageError: If the samples are no colour images ``(N, 3, H, W)``.
    """
    if samples.ndim != 4 or samples.shape[1] != 3:
        raise UsageError(
            f'{who} takes images (N, 3, H, W), but the samples have shape {tuple(samples.shape)};'
            " latents need model.decoder, for example dict(type='LatentDecoder')"
        )
    for part in samples.split(PART):
        yield list(to_uint8(part).cpu())
