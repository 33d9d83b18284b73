# Copyright (c) mmfgm authors.
"""What generated samples are compared with: statistics of a data set's features, from images or
from a file."""

import time
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_dist_info, is_main_process
from mmengine.logging import MMLogger
from torch import Tensor
from torch.utils.data import DataLoader

from mmfgm.datasets import TensorDataset, collate
from mmfgm.errors import UsageError
from mmfgm.files import check_regular, whole_file
from mmfgm.registry import DATASETS

from .frechet import StreamingMoments


@dataclass(frozen=True)
class Reference:
    """Feature statistics of a reference set.

    Args:
        mean (Tensor): ``(d,)`` float64.
        cov (Tensor): ``(d, d)`` float64, unbiased.
        n (int, optional): Number of samples; None if the file does not say.
        features (Tensor, optional): The features ``(n, d)`` themselves, float32, in the order of
            the set.
    """

    mean: Tensor
    cov: Tensor
    n: int | None = None
    features: Tensor | None = None


def load_reference(reference: str | dict, feature: Any, keep_features: bool = False) -> Reference:
    """Statistics from a ``.npz`` file, or from the images of a data set.

    Args:
        reference (str | dict): A file of :func:`save_reference`, of EDM (``mu`` and ``sigma``), or
            of ADM (Dhariwal & Nichol, 2021), such as ``VIRTUAL_imagenet256_labeled.npz``: ``mu``
            and ``sigma`` of the whole set, and ``arr_0``, images of a part of it, whose features
            are computed for metrics that compare features; its ``mu_s`` and ``sigma_s``, of spatial
            features, are not used. Or the config of a dataset whose items have ``x_0``. What is
            computed is so on all processes together.
        feature: The feature function that the samples will go through.
        keep_features (bool): Whether the metric compares features, not only their moments.

    Raises:
        UsageError: If the file cannot be read or is of another feature function, or has no
            features.
    """
    if not isinstance(reference, str):
        return _compute(DATASETS.build(reference), feature, keep_features)
    dim = getattr(feature, 'dim', None)
    data = _read_npz(reference, dim, keep_features)
    mean, cov = (torch.from_numpy(data[key]) for key in ('mu', 'sigma'))
    dim = dim or len(mean)
    if mean.shape != (dim,) or cov.shape != (dim, dim):
        raise UsageError(
            f'reference statistics {reference!r} are of dimension {tuple(mean.shape)}, covariance '
            f'{tuple(cov.shape)}, but {type(feature).__name__} has {dim} features; make them with '
            'tools/fid_stats.py for this feature function'
        )
    made_by = str(data.get('feature', feature.name))
    if made_by != feature.name:
        raise UsageError(
            f'reference statistics {reference!r} are of the features {made_by!r}, not'
            f' {feature.name!r}; make them with tools/fid_stats.py, or name others'
        )
    if 'arr_0' in data:
        images = torch.from_numpy(data['arr_0']).permute(0, 3, 1, 2)
        features = _compute(TensorDataset(images), feature, keep_features).features
        return Reference(mean, cov, data.get('n'), features)
    if keep_features and 'features' not in data:
        raise UsageError(
            f'reference statistics {reference!r} hold no features, which KID and precision/recall'
            ' compare; make them with tools/fid_stats.py --features'
        )
    features = torch.from_numpy(data['features']) if keep_features else None
    return Reference(mean, cov, data.get('n'), features)


def _read_npz(path: str, dim: int | None, keep_features: bool) -> dict[str, Any]:
    """``mu``, ``sigma``, and where they are there ``n``, ``feature`` and ``features`` or else the
    images ``arr_0``; nothing else of the file is unpacked."""
    check_regular(path)
    square = max(8 * (dim or 0) ** 2, 1 << 28)
    limits = dict(mu=square, sigma=square, n=8, feature=1 << 12)
    if keep_features:
        limits['features'] = 1 << 34
    data: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
        found = sorted(name.removesuffix('.npy') for name in sizes)
        if keep_features and 'features' not in found:
            limits['arr_0'] = 1 << 34
        for name in limits.keys() & set(found):
            # a header of numpy's takes some hundred bytes
            if sizes.get(f'{name}.npy', 0) > limits[name] + (1 << 12):
                raise ValueError(f'{name} takes {sizes[f"{name}.npy"]:,} bytes')
        with np.load(path) as content:
            data = {name: content[name] for name in limits.keys() & set(found)}
        for name in data.keys() & {'mu', 'sigma', 'features'}:
            kind = np.float32 if name == 'features' else np.float64
            data[name] = data[name].astype(kind)
            if not np.isfinite(data[name]).all():
                raise ValueError(f'{name} holds inf or nan')
        if data.keys() >= {'mu', 'sigma'} and (data['mu'].ndim, data['sigma'].ndim) != (1, 2):
            raise ValueError(f'mu has shape {data["mu"].shape}, sigma {data["sigma"].shape}')
        if 'features' in data and (data['features'].ndim != 2 or not len(data['features'])):
            raise ValueError(f'features have shape {data["features"].shape}')
        if 'arr_0' in data and (
            data['arr_0'].dtype != np.uint8
            or data['arr_0'].ndim != 4
            or data['arr_0'].shape[3] != 3
            or not len(data['arr_0'])
        ):
            raise ValueError(
                f'arr_0 is {data["arr_0"].dtype} {data["arr_0"].shape}, expected uint8 (n, H, W, 3)'
            )
        if 'n' in data:
            data['n'] = int(data['n'])
            if data['n'] < 2:
                raise ValueError(f'n is {data["n"]}')
    # damaged and hostile bytes raise anything, MemoryError included
    except Exception as e:
        raise UsageError(
            f'reference statistics {path!r} cannot be read as a .npz file: {e!r}; make them with'
            ' tools/fid_stats.py'
        ) from e
    if not {'mu', 'sigma'} <= set(data):
        raise UsageError(
            f'reference statistics {path!r} must hold mu and sigma, but hold {found}; make them'
            ' with tools/fid_stats.py'
        )
    return data


def save_reference(path: str, reference: Reference, feature: Any) -> None:
    """Write a ``.npz`` with ``mu``, ``sigma`` (EDM's keys), ``n``, ``feature`` and perhaps
    ``features``, in one go."""
    data = dict(
        mu=reference.mean.cpu().numpy(),
        sigma=reference.cov.cpu().numpy(),
        n=reference.n,
        feature=feature.name,
    )
    if reference.features is not None:
        data['features'] = reference.features.numpy()
    with whole_file(path) as unfinished, open(unfinished, 'wb') as f:
        np.savez(f, **data)


@torch.no_grad()
def _compute(dataset, feature: Any, keep_features: bool) -> Reference:
    """Each process takes every world_size-th item; the moments are summed, features put back in
    order."""
    rank, world_size = get_dist_info()
    mine = range(rank, len(dataset), world_size)
    moments = None
    kept = []
    start = last = time.monotonic()
    for done, batch in enumerate(DataLoader(dataset, 500, sampler=mine, collate_fn=collate), 1):
        features = feature(batch['x_0'])
        moments = moments or StreamingMoments(features.shape[1])
        moments.update(features)
        if keep_features:
            kept.append(features.float().cpu())
        if is_main_process() and time.monotonic() - last > 30:
            last = time.monotonic()
            left = max(len(mine) - 500 * done, 0)
            MMLogger.get_current_instance().info(
                f'Reference features: {500 * done}/{len(mine)}, eta'
                f' {(last - start) / (500 * done) * left:.0f} s'
            )
    if len(dataset) < max(2, world_size):
        raise UsageError(
            f'the reference {type(dataset).__name__} has {len(dataset)} samples, too few for'
            ' statistics; use more samples or fewer processes'
        )
    moments.all_reduce()
    if not keep_features:
        return Reference(moments.mean, moments.cov, moments.n)
    features = torch.cat(kept).new_empty(len(dataset), moments.dim)
    for other, part in enumerate(all_gather_object(torch.cat(kept))):
        features[other::world_size] = part
    return Reference(moments.mean, moments.cov, moments.n, features)
