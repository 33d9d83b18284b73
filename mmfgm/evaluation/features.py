# Copyright (c) mmfgm authors.
"""Feature functions: images or points to ``(N, dim)``, and what they need."""

import json
import os
import os.path as osp
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import barrier
from mmengine.logging import MMLogger
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mmfgm.errors import UsageError
from mmfgm.files import sha256 as file_sha256
from mmfgm.models import check_finite, from_uint8, read_pickle
from mmfgm.registry import TASK_UTILS


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 by ``floor(clip(127.5 x + 128, 0, 255))``, the rule of EDM's FID;
    uint8 passes."""
    return (
        images
        if images.dtype == torch.uint8
        else (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
    )


def build_feature(cfg: dict) -> Any:
    """Build a feature function; equal configs share one, so a network is loaded and run once for
    all metrics."""
    return _build_feature(json.dumps(cfg, sort_keys=True))


@cache
def _build_feature(key: str) -> Any:
    return TASK_UTILS.build(json.loads(key))


@contextmanager
def full_precision():
    """No TF32: features must not depend on what training was sped up with."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


@TASK_UTILS.register_module()
class Pixels:
    """The feature function that is the sample itself, flattened to ``(N, d)``; uint8 images count
    as [-1, 1].

    Args:
        pool (int): Side of the squares of an image whose means are taken, so that fewer samples
            determine a covariance; it must divide the image's sides. Defaults to 1.

    Raises:
        UsageError: If it is no such side.
    """

    def __init__(self, pool: int = 1):
        self.pool = pool
        self.name = 'pixels' if pool == 1 else f'pixels, means of {pool} x {pool}'

    def __call__(self, samples: Tensor) -> Tensor:
        samples = from_uint8(samples)
        if self.pool != 1:
            if samples.ndim != 4 or self.pool < 1 or any(n % self.pool for n in samples.shape[2:]):
                raise UsageError(
                    f'expected images (N, C, H, W) whose sides {self.pool} divides, found samples'
                    f' of shape {tuple(samples.shape)}; choose another pool of Pixels'
                )
            samples = avg_pool2d(samples, self.pool)
        return samples.flatten(1)


@TASK_UTILS.register_module()
class InceptionV3:
    """The Inception of TensorFlow's 2015-12-05 graph, in torch-fidelity's port: the network behind
    FID.

    Inputs become uint8 by :func:`to_uint8` and are resized inside the network as TensorFlow 1 did.

    Args:
        weights (str, optional): Local file of torch-fidelity's weights. Without it they are
            downloaded into torch's hub folder.
        sha256 (str, optional): How the file's SHA-256 begins. Defaults to that of the published
            file; None accepts other weights of the same network, whose numbers nobody else has.

    Raises:
        UsageError: If torch-fidelity or the weights are missing, or are those of another network.
    """

    name = 'inception-v3-compat'
    dim = 2048

    def __init__(self, weights: str | None = None, sha256: str | None = '6726825d'):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as port
        except ImportError as e:
            raise UsageError(
                f'FID and its kin need torch-fidelity ({e}); install it: pip install "mmfgm[eval]"'
            ) from e
        path = weights or download(
            port.URL_INCEPTION_V3, sha256, 'name it: feature=dict(type="InceptionV3", weights=PATH)'
        )
        if not osp.isfile(path):
            raise UsageError(
                f'there are no Inception weights at {path!r}; leave `weights` out to download them,'
                f' or get {port.URL_INCEPTION_V3}'
            )
        found = file_sha256(path)
        if sha256 is not None and not found.startswith(sha256):
            raise UsageError(
                f'{path!r} is not the published Inception: its SHA-256 begins with {found[:8]}, not'
                f" {sha256}, so its FID would compare with nobody else's; get the published file,"
                ' or say sha256=None'
            )
        # torch-fidelity would unpickle anything; after this the file is known to hold tensors only
        check_finite(read_pickle(path), path)
        try:
            self.network = port.FeatureExtractorInceptionV3(
                self.name, ['2048', 'logits_unbiased'], path
            )
        except (RuntimeError, TypeError, AttributeError) as e:
            raise UsageError(
                f'{path!r} holds the weights of another network than Inception v3: {str(e)[:500]}'
            ) from e
        self._last: tuple[Tensor | None, Any] = (None, None)

    @torch.no_grad()
    def _run(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        # several metrics ask about one batch
        if self._last[0] is not samples:
            images = to_uint8(samples).to(get_device())
            if images.ndim != 4 or images.shape[1] != 3:
                raise UsageError(
                    'Inception takes images (N, 3, H, W), but the samples have shape'
                    f' {tuple(images.shape)}; choose another feature'
                )
            with full_precision():
                self._last = (samples, self.network.to(images.device)(images))
        return self._last[1]

    def __call__(self, samples: Tensor) -> Tensor:
        """Features ``(N, 2048)`` of images ``(N, 3, H, W)``, uint8 or in [-1, 1]."""
        return self._run(samples)[0]

    def logits(self, samples: Tensor) -> Tensor:
        """Logits ``(N, 1008)`` without bias, as the Inception Score takes them."""
        return self._run(samples)[1]


def download(url: str, sha256: str | None, fix: str) -> str:
    """Download weights into torch's hub folder, once a machine; to be called by all processes.

    Args:
        url (str): Where they are.
        sha256 (str, optional): How the file's SHA-256 begins.
        fix (str): What to do with a file that was got by other means.

    Returns:
        str: The file.

    Raises:
        UsageError: If they are not there afterwards.
    """
    path = osp.join(torch.hub.get_dir(), 'checkpoints', osp.basename(url))
    if int(os.environ.get('LOCAL_RANK', 0)) == 0 and not osp.isfile(path):
        MMLogger.get_current_instance().info(f'Downloading {url} to {path}')
        os.makedirs(osp.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as e:
            MMLogger.get_current_instance().error(f'{url} could not be downloaded: {e}')
    # the other processes of this machine wait; all look whether it worked
    barrier()
    if not osp.isfile(path):
        raise UsageError(
            f'the weights could not be downloaded from {url}; get the file by other means and {fix}'
        )
    return path
