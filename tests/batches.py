# Copyright (c) mmfgm authors.
"""Batches are nested dicts of tensors: what compares, cuts and joins them."""

import torch


def same(batch, other):
    """Whether two batches hold the same values under the same names."""
    if isinstance(batch, torch.Tensor):
        return torch.equal(batch, other)
    return batch.keys() == other.keys() and all(same(batch[name], other[name]) for name in batch)


def rows(batch, index):
    """Some items of a batch, or one."""
    if isinstance(batch, torch.Tensor):
        return batch[index]
    return {name: rows(value, index) for name, value in batch.items()}


def concatenate(batches):
    """Several batches as one."""
    if isinstance(batches[0], torch.Tensor):
        return torch.cat(batches)
    return {name: concatenate([batch[name] for batch in batches]) for name in batches[0]}
