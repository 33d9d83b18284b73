# Copyright (c) mmfgm authors.
"""Prompt embeddings and VAE latents computed beforehand: the format, and the data sets; the tools
write it.

A cache is a folder with ``manifest.json``, ``shard_000000.safetensors`` and so on, and, with
prompts, ``null.safetensors`` of the empty prompt. A shard of ``n`` items holds latents ``x_0 (n, C,
h, w)``, ``labels (n,)`` in int64 and the parts of conditions, as far as the cache has them. The
manifest's ``classes`` are the names of the labels; its ``conditions`` say which parts each
condition is made of: ``prompt_embeds = [clip, t5]`` are ``clip (n, 77, D_clip)``
and ``t5 (n, L, D)``, joined token after token, where channels that a part lacks are zero. Where
padding was dropped, ``t5`` is ``(tokens, D)``, the items' tokens one after the other, and
``t5_tokens (n,)`` says how many each has.
"""

import bisect
import os
import os.path as osp
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from mmfgm.errors import UsageError
from mmfgm.files import check_regular, check_seal, differences, read_json, sha256
from mmfgm.registry import DATASETS

from .base import Batch, BatchDataset, item_seed

NULL = 'null.safetensors'
# numbers of classes, one an item, beside values of the cache's dtype
LABELS = 'labels'
# of caches that were made before their manifests said it
CONDITIONS = dict(prompt_embeds=['clip', 't5'], pooled_embeds=['pooled'])
OPEN_SHARDS = 64


def read_manifest(path: str, kind: str | None = None) -> dict:
    """The ``manifest.json`` of a cache.

    Raises:
        UsageError: If there is none, or it is not of a finished cache of this ``kind``.
    """
    file = osp.join(path, 'manifest.json')
    if not osp.isfile(file):
        unfinished = osp.isfile(osp.join(path, 'job.json'))
        raise UsageError(
            f'{path!r} is not a finished cache, as {file} is missing; '
            + (
                'run the tool that began it again, which goes on where it stopped'
                if unfinished
                else 'make one with tools/cache_prompts.py, tools/cache_latents.py or'
                ' tools/draw_couplings.py'
            )
        )
    manifest = read_json(file, 'make the cache again', dict)
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UsageError(f'{file!r} is damaged ({e!r}); make the cache again') from e
    found = manifest['kind']
    if kind is not None and found != kind:
        raise UsageError(
            f'{path!r} is a cache of {found}, expected one of {kind}; name another folder or'
            ' data set'
        )
    return manifest


def _check_manifest(manifest: dict) -> None:
    """Hold a manifest against what the tools write, and add what older ones leave out.

    Raises:
        KeyError | TypeError | AttributeError | ValueError: If it is none.
    """
    check_seal(manifest)
    layout = manifest['layout']
    manifest.setdefault('conditions', CONDITIONS if 'clip' in layout else {})
    manifest['identity'].keys()
    if not isinstance(getattr(torch, str(manifest['settings']['dtype']), None), torch.dtype):
        raise ValueError(f'settings.dtype is {manifest["settings"]["dtype"]!r}')
    for name, shape in layout.items():
        if bool(shape) == (name == LABELS) or not all(
            type(size) is int and 0 < size < 1 << 20 for size in shape
        ):
            raise ValueError(f'layout.{name} is {shape}')
    for name, parts in manifest['conditions'].items():
        if not parts or not set(parts) <= set(layout):
            raise ValueError(f'conditions.{name} is {parts}')
    start = 0
    for entry in [*manifest['shards'], *([manifest['null']] if manifest.get('null') else [])]:
        # a path would lead out of the folder
        if not re.fullmatch(r'\w+\.safetensors', entry['file']):
            raise ValueError(f'a file is called {entry["file"]!r}')
        if type(entry['size']) is not int or not isinstance(entry['sha256'], str):
            raise ValueError(f'{entry["file"]} has no size or no sha256')
        if entry['file'] == NULL:
            continue
        if type(entry['count']) is not int or entry['count'] < 0 or entry['start'] != start:
            raise ValueError(f'{entry["file"]} does not follow the one before it')
        start += entry['count']
    if manifest['count'] != start or not start:
        raise ValueError(f'count is {manifest["count"]}, but the shards hold {start} items')


def checksums(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``NAME_crc (n,)``: the CRC-32 of each item's values of each tensor of a shard."""
    result = {}
    for name, values in tensors.items():
        if name.endswith('_tokens'):
            continue
        lengths = tensors.get(f'{name}_tokens')
        rows = values.unbind() if lengths is None else values.split(lengths.tolist())
        result[f'{name}_crc'] = torch.tensor([_crc(row) for row in rows], dtype=torch.int64)
    return result


def _crc(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().flatten().view(torch.uint8).numpy())


def verify_cache(path: str) -> None:
    """Read a whole cache and compare its checksums.

    Raises:
        UsageError: Names the files that are missing or not as they were written.
    """
    manifest = read_manifest(path)
    entries = [*manifest['shards'], *([manifest['null']] if manifest.get('null') else [])]
    bad = [
        entry['file']
        for entry in entries
        if not osp.isfile(osp.join(path, entry['file']))
        or sha256(osp.join(path, entry['file'])) != entry['sha256']
    ]
    if bad:
        raise UsageError(
            f'{len(bad)} of {len(entries)} files of the cache {path!r} are missing or corrupted, by'
            f' their checksums: {", ".join(bad[:8])}; delete them and run the tool again, which'
            ' makes only those'
        )


class _Shard:
    """An open shard; its values stay on the disk until they are read."""

    def __init__(self, path: str):
        self.path = path
        check_regular(path)
        try:
            self.file = safe_open(path, framework='pt')
            names = self.file.keys()
            self.offsets = {
                name[: -len('_tokens')]: [0, *self.file.get_tensor(name).cumsum(0).tolist()]
                for name in names
                if name.endswith('_tokens')
            }
            self.values = {name: self.file.get_slice(name) for name in names}
            self.crcs = {
                name: self.file.get_tensor(f'{name}_crc')
                for name in names
                if f'{name}_crc' in names
            }
        # a damaged header, or token counts that are none
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as e:
            raise UsageError(
                f'{path!r} is missing or corrupted ({e}); delete it and run the tool that made it'
                ' again, which makes only what is missing'
            ) from e

    def check(self, layout: dict[str, tuple[int, ...]], count: int) -> None:
        """Hold the header against the manifest.

        Raises:
            UsageError: If a value is missing or of another shape.
        """
        # a shard that lost all its items is empty
        for name, shape in layout.items() if count else ():
            found = tuple(self.values[name].get_shape()) if name in self.values else None
            ends = self.offsets.get(name)
            whole = (count, *shape)
            if ends is not None and found is not None:
                # at most as many tokens as the layout has, and all of them there
                lengths = [after - before for before, after in pairwise(ends)]
                within = len(lengths) == count and all(0 <= n <= shape[0] for n in lengths)
                whole = (ends[-1] if within else -1, *shape[1:])
            if found != whole or len(self.crcs.get(name, range(count))) != count:
                raise UsageError(
                    f'{self.path!r} is corrupted: {name} has shape {found}, expected {whole};'
                    ' delete it and run the tool that made it again, which makes only what is'
                    ' missing'
                )

    def tokens(self, name: str, row: int) -> int:
        """How many one item has, of a part whose padding was dropped."""
        return self.offsets[name][row + 1] - self.offsets[name][row]

    def copy(self, name: str, row: int, out: Tensor) -> None:
        """Copy one item's values into ``out``, whose rest stays as it is where padding was dropped.

        Raises:
            UsageError: If they are not as they were written.
        """
        if name not in self.offsets:
            values = self.values[name][row]
            out[...] = values
        else:
            values = self.values[name][self.offsets[name][row] : self.offsets[name][row + 1]]
            out[: len(values)] = values
        # caches of before have no checksums of items
        if name in self.crcs and _crc(values) != int(self.crcs[name][row]):
            raise UsageError(
                f'{self.path!r} is corrupted: {name} of its item {row} has another checksum than'
                ' when it was written; delete it and run the tool that made it again, which makes'
                ' only what is missing'
            )


class ShardedCache(BatchDataset):
    """Items by index out of a cache's shards, which are memory-mapped and opened when first needed
    in each process.

    Stateless by index: MMEngine's ``InfiniteSampler`` shuffles, shards by rank and resumes.

    Args:
        path (str): The cache's folder.
        identity (dict, optional): Of the models that the training uses, which must have made the
            cache.
        verify (bool): Compare all checksums, which reads all of the cache; sizes and headers are
            always checked.
        drop_padding (bool): Prompts of a batch have as many tokens as the longest of them, instead
            of as many as the encoder makes at most. Networks that attend to padding, as Stable
            Diffusion 3 does, then see another condition than their pipeline gives them. Defaults to
            False.

    Raises:
        UsageError: If the folder is not such a cache, a shard is missing or corrupted, other models
            made it, or padding is to be dropped that the cache did not leave out, or that the
            network leaves out by itself.
    """

    kind = ''

    def __init__(
        self,
        path: str,
        identity: dict | None = None,
        verify: bool = False,
        drop_padding: bool = False,
    ):
        super().__init__()
        self.path = osp.expanduser(path)
        self.manifest = read_manifest(self.path, self.kind)
        self.layout = {name: tuple(shape) for name, shape in self.manifest['layout'].items()}
        self.dtype = getattr(torch, self.manifest['settings']['dtype'])
        if identity is not None:
            differs = list(differences(identity, self._compared(identity)))
            if differs:
                raise UsageError(
                    f'{self.path!r} is a cache of other'
                    f' {"encoders" if self.kind == "prompts" else "models"}:'
                    f' {"; ".join(differs[:4])}; make it again with the ones of this training'
                )
        self.shards = self.manifest['shards']
        self.starts = [shard['start'] for shard in self.shards]
        for entry in [
            *self.shards,
            *([self.manifest['null']] if self.manifest.get('null') else []),
        ]:
            self._check(entry)
        if verify:
            verify_cache(self.path)
        self._opened = {}
        self.drop_padding = drop_padding
        if drop_padding:
            self._check_padding()

    def __len__(self) -> int:
        return self.manifest['count']

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_opened': {}}

    def _compared(self, identity: dict) -> dict:
        return self.manifest['identity']

    def _check(self, entry: dict) -> None:
        path = osp.join(self.path, entry['file'])
        size = osp.getsize(path) if osp.isfile(path) else None
        if size != entry['size']:
            raise UsageError(
                f'{path!r} is missing or corrupted: it has {size} bytes, expected'
                f' {entry["size"]}; delete it and run the tool that made it again, which makes only'
                ' what is missing'
            )
        _Shard(path).check(
            self.layout if entry['file'] != NULL else self._null_layout(), entry.get('count', 1)
        )

    def _check_padding(self) -> None:
        first = self._shard(self.shards[0]['file'])
        if any(name.endswith('_mask') for name in self.manifest['conditions']):
            raise UsageError(
                f'drop_padding expects prompts without a mask, found one in {self.path!r}: this'
                ' network leaves padding out by itself; remove drop_padding'
            )
        if not first.offsets:
            raise UsageError(
                f'drop_padding expects a cache without padding, found {self.path!r} with it; make'
                ' it again with tools/cache_prompts.py --drop-padding'
            )

    def _null_layout(self) -> dict[str, tuple[int, ...]]:
        """Of the empty prompt, which has no latents."""
        parts = {part for parts in self.manifest['conditions'].values() for part in parts}
        return {name: shape for name, shape in self.layout.items() if name in parts}

    def where(self, index: int) -> str:
        number = bisect.bisect_right(self.starts, index % self.manifest['count']) - 1
        return f'item {index} in {osp.join(self.path, self.shards[number]["file"])}'

    def _shard(self, name: str) -> _Shard:
        # by process, as a forked worker shares its parent's files
        opened = self._opened.setdefault(os.getpid(), OrderedDict())
        if name not in opened:
            opened[name] = _Shard(osp.join(self.path, name))
            if len(opened) > OPEN_SHARDS:
                opened.popitem(last=False)
        opened.move_to_end(name)
        return opened[name]

    def _locate(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < self.manifest['count']:
            raise IndexError(f'index {index} of a cache of {self.manifest["count"]} items')
        number = bisect.bisect_right(self.starts, index) - 1
        return self._shard(self.shards[number]['file']), index - self.starts[number]

    def _read(self, rows: list[tuple[_Shard, int]], name: str) -> Tensor:
        dtype = torch.int64 if name == LABELS else self.dtype
        shape = self.layout[name]
        if self.drop_padding and all(name in shard.offsets for shard, _ in rows):
            # "no prompt" too must have its place
            longest = max(shard.tokens(name, row) for shard, row in [*rows, *self._null_rows()])
            shape = (longest, *shape[1:])
        out = torch.zeros(len(rows), *shape, dtype=dtype)
        for value, (shard, row) in zip(out, rows):
            shard.copy(name, row, value)
        return out

    def _null_rows(self) -> list[tuple[_Shard, int]]:
        return [(self._shard(NULL), 0)] if self.manifest.get('null') else []

    def _prompts(self, rows: list[tuple[_Shard, int]]) -> Batch:
        """The conditions ``(n, ...)`` of items, by the names that the network takes."""
        cond = {}
        for name, parts in self.manifest['conditions'].items():
            values = [self._read(rows, part) for part in parts]
            widest = max(value.shape[-1] for value in values)
            values = [pad(value, (0, widest - value.shape[-1])) for value in values]
            cond[name] = torch.cat(values, dim=1)
        return cond

    @property
    def null(self) -> Batch:
        """The conditions of the empty prompt, for guidance."""
        if not self.manifest.get('null'):
            raise UsageError(
                f'{self.path!r} was made without prompts, so it has no empty prompt either;'
                ' make it again with prompts'
            )
        return {name: value[0] for name, value in self._prompts(self._null_rows()).items()}


@DATASETS.register_module()
class CachedPrompts(ShardedCache):
    """Prompts encoded by ``tools/cache_prompts.py``: items ``dict(idx,
    cond=dict(prompt_embeds, pooled_embeds))`` in the cache's dtype.

    ``prompt_embeds (77 + L, D)`` and ``pooled_embeds (P,)`` are what
    ``StableDiffusion3Pipeline.encode_prompt`` returns; dropped padding is zero. For the arguments
    and errors see :class:`ShardedCache`.
    """

    kind = 'prompts'

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        return dict(idx=idx, cond=self._prompts([self._locate(index) for index in idx.tolist()]))


@DATASETS.register_module()
class CachedPromptSamples(CachedPrompts):
    """What to generate in an evaluation or a picture: items ``dict(idx, seed,
    cond=dict(prompt_embeds, pooled_embeds))``.

    Args:
        path (str): The cache's folder.
        num_samples (int): Number of items; item ``idx`` has prompt ``idx % count``, and larger
            indices are padding.
        seed (int): Selects other noise. Defaults to 0.
        **kwargs: For :class:`CachedPrompts`.
    """

    def __init__(self, path: str, num_samples: int, seed: int = 0, **kwargs):
        super().__init__(path, **kwargs)
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        rows = [self._locate(index % self.manifest['count']) for index in idx.tolist()]
        return dict(idx=idx, seed=item_seed(idx, self.seed), cond=self._prompts(rows))


@DATASETS.register_module()
class CachedLatents(ShardedCache):
    """Images encoded by ``tools/cache_latents.py``: items ``dict(idx, x_0,
    cond=dict([prompt_embeds, pooled_embeds], [labels]))``.

    ``x_0 (C, h, w)`` is shifted and scaled as the transformer expects it, and float32 whatever the
    cache stores, as noise is added to it; the embeddings are as in :class:`CachedPrompts`.

    Args:
        path (str): The cache's folder.
        latent_shape (tuple, optional): ``(C, h, w)`` that the network takes, which the cache must
            have.
        prompts (bool): Whether items carry their captions' embeddings.
        labels (bool): Whether items carry the numbers of their classes. Defaults to False.
        identity (dict, optional): As for :class:`ShardedCache`; what it leaves out, such as text
            encoders, is not compared.
        verify (bool), drop_padding (bool): As for :class:`ShardedCache`.

    Raises:
        UsageError: As for :class:`ShardedCache`; if the latents have another shape, or there are no
            captions or no labels.
    """

    kind = 'latents'

    def __init__(
        self,
        path: str,
        latent_shape: Sequence[int] | None = None,
        prompts: bool = True,
        identity: dict | None = None,
        verify: bool = False,
        labels: bool = False,
        drop_padding: bool = False,
    ):
        super().__init__(path, identity, verify, drop_padding)
        self.event_shape = self.layout['x_0']
        if latent_shape is not None and tuple(latent_shape) != self.event_shape:
            raise UsageError(
                f'latent_shape is {tuple(latent_shape)}, but the latents of {self.path!r} are'
                f' {self.event_shape} (images of {self.manifest["settings"]["resolution"]} pixels);'
                ' make them agree'
            )
        if prompts and not self.manifest['conditions']:
            raise UsageError(
                f'{self.path!r} has no captions; set prompts=False, or make it again with'
                ' --captions'
            )
        if labels and LABELS not in self.layout:
            raise UsageError(
                f'{self.path!r} has no labels; set labels=False, or make it again with --labels'
            )
        self.prompts = prompts
        self.labels = labels

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        rows = [self._locate(index) for index in idx.tolist()]
        cond = self._prompts(rows) if self.prompts else {}
        if self.labels:
            cond[LABELS] = self._read(rows, LABELS)
        return dict(idx=idx, x_0=self._read(rows, 'x_0').float(), cond=cond)

    def _compared(self, identity: dict) -> dict:
        return {
            name: value for name, value in super()._compared(identity).items() if name in identity
        }
