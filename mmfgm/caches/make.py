# Copyright (c) mmfgm authors.
"""Make a cache of prompts, or of images and their captions; several processes share the work."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfgm.datasets import LABELS
from mmfgm.errors import UsageError
from mmfgm.models.families import KLEncoder, LatentEncoder, PromptEncoder, find
from mmfgm.processes import on_main, rank_and_size

from .encoders import identity_of
from .sources import ImageFiles, read_captions, read_classes, read_image, read_prompts
from .writer import ShardWriter, keep_good, write_shards

DTYPES = dict(bf16='bfloat16', fp16='float16', fp32='float32')


@dataclass
class CacheOptions:
    """What all caches have in common.

    Args:
        dtype (str): Of the stored values: ``'bf16'``, ``'fp16'`` or ``'fp32'``. Defaults to
            ``'bf16'``.
        batch_size (int): Items at a time, of each process. Defaults to 16.
        shard_size (int): Items per file. Defaults to 1000.
        on_bad (str): ``'error'``, or ``'skip'`` to leave bad items out and list them in the
            manifest. Defaults to ``'error'``.
        device (str, optional): Defaults to the GPU, if there is one.

    Raises:
        UsageError: If one of them is out of range.
    """

    dtype: str = 'bf16'
    batch_size: int = 16
    shard_size: int = 1000
    on_bad: str = 'error'
    device: str | None = None

    def __post_init__(self):
        for name in ('batch_size', 'shard_size'):
            if getattr(self, name) < 1:
                raise UsageError(
                    f'--{name.replace("_", "-")} must be at least 1, but is {getattr(self, name)}'
                )
        if self.dtype not in DTYPES:
            raise UsageError(f'--dtype must be one of {list(DTYPES)}, but is {self.dtype!r}')
        if self.on_bad not in ('error', 'skip'):
            raise UsageError(f"--on-bad must be 'error' or 'skip', but is {self.on_bad!r}")
        self.device = self.device or ('cuda' if torch.cuda.is_available() else 'cpu')

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, DTYPES[self.dtype])

    @property
    def settings(self) -> dict[str, Any]:
        """What the manifest says of them."""
        return dict(
            dtype=DTYPES[self.dtype], batch_size=self.batch_size, shard_size=self.shard_size
        )


def cache_prompts(
    source: str,
    out: str,
    model: str,
    column: str = 'prompt',
    options: CacheOptions | None = None,
    **encoder: Any,
) -> None:
    """Encode the prompts of a file into a cache; one that an earlier run began is taken up.

    Args:
        source (str): A ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` file.
        out (str): The cache's folder.
        model (str): Folder or hub id of a pipeline of any family.
        column (str): Of ``source``. Defaults to ``'prompt'``.
        options (CacheOptions, optional): See there.
        **encoder: Options of the family's encoder, such as ``max_length``.

    Raises:
        UsageError: If the file, the model or the folder is not what it should be.
    """
    options = options or CacheOptions()
    places, prompts = on_main(lambda: read_prompts(source, column))
    prompt_encoder = _open_encoder(model, options, encoder)
    # all are looked at before the first is encoded, which may be hours earlier
    bad = on_main(lambda: prompt_encoder.bad(prompts))
    skipped = on_main(lambda: keep_good(places, bad, options.on_bad))
    good = [prompt for i, prompt in enumerate(prompts) if i not in bad]
    digest = hashlib.sha256('\n'.join(map(json.dumps, good)).encode()).hexdigest()
    job: dict[str, Any] = dict(
        kind='prompts',
        **_describe(prompt_encoder),
        source=dict(count=len(good), sha256=digest, skipped=skipped),
    )
    job['settings'].update(options.settings)
    _say_skipped(skipped, 'prompts')
    write_shards(
        ShardWriter(out, job),
        len(good),
        options.shard_size,
        options.batch_size,
        lambda items: (prompt_encoder.store([good[i] for i in items]), []),
        lambda: prompt_encoder.store(['']),
        'prompt',
    )


def cache_latents(
    source: str,
    out: str,
    model: str,
    resolution: int = 1024,
    captions: str | None = None,
    workers: int = 4,
    options: CacheOptions | None = None,
    labels: str | None = None,
    vae_only: bool = False,
    **encoder: Any,
) -> None:
    """Encode images, and their captions or labels, into a cache; one that an earlier run began is
    taken up.

    Args:
        source (str): A folder, a ``.zip``, a ``.tar`` or a folder of ``.tar``.
        out (str): The cache's folder.
        model (str): Folder or hub id of a pipeline of any family.
        resolution (int): Pixels of a side. Defaults to 1024.
        captions (str, optional): A ``.jsonl`` with ``file_name`` and ``text``, or ``'txt'`` for a
            text file beside each image. Defaults to none.
        workers (int): Threads that decode images. Defaults to 4.
        options (CacheOptions, optional): See there.
        labels (str, optional): ``'folders'`` or ``'json'``, see
            :func:`~mmfgm.caches.sources.read_classes`. Defaults to none.
        vae_only (bool): Whether ``model`` is a VAE that was published alone, such as
            ``stabilityai/sd-vae-ft-ema``, rather than a pipeline. Defaults to False.
        **encoder: Options of the family's encoder of prompts, such as ``max_length``.

    Raises:
        UsageError: If the images, the model or the folder are not what they should be.
    """
    options = options or CacheOptions()
    if vae_only and captions:
        raise UsageError(
            f'{model!r} is a VAE alone (--vae-only), which encodes no captions; name a pipeline,'
            ' or leave --captions out'
        )
    latents = _open_vae(model, vae_only).to(options.device)
    if resolution < 1 or resolution % latents.factor:
        raise UsageError(
            f'--resolution must be a multiple of the {latents.factor} pixels of a latent, but is'
            f' {resolution}'
        )
    # an open archive cannot be sent from one process to another
    archive = source.endswith('.zip')
    files = ImageFiles(source) if archive else on_main(lambda: ImageFiles(source))
    names = files.images
    texts = [''] * len(files.images)
    numbers, classes = on_main(lambda: read_classes(files, labels)) if labels else ([], [])
    skipped = []
    side = resolution // latents.factor
    job: dict[str, Any] = dict(
        kind='latents',
        identity=on_main(lambda: identity_of(latents)),
        settings=dict(
            options.settings,
            resolution=resolution,
            aspect='shorter side to resolution, centre crop',
            **latents.settings,
        ),
        layout=dict(x_0=[latents.channels, side, side]),
        conditions={},
    )
    if labels:
        job['layout'][LABELS] = []
        job['classes'] = classes
    prompt_encoder = None
    if captions:
        prompt_encoder = _open_encoder(model, options, encoder)
        found = on_main(lambda: read_captions(files, captions))
        bad = on_main(lambda: prompt_encoder.bad(found))
        skipped = on_main(
            lambda: keep_good([f'caption of {name}' for name in files.images], bad, options.on_bad)
        )
        names = [name for i, name in enumerate(names) if i not in bad]
        texts = [text for i, text in enumerate(found) if i not in bad]
        numbers = [number for i, number in enumerate(numbers) if i not in bad]
        for key, value in _describe(prompt_encoder).items():
            job[key].update(value)
    listing = [[name, files.sizes[name], text] for name, text in zip(names, texts)]
    listing = [[*entry, number] for entry, number in zip(listing, numbers)] if labels else listing
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    job['source'] = dict(count=len(names), sha256=digest, skipped=skipped)
    _say_skipped(skipped, 'images')

    def read(item: int) -> Tensor | str:
        try:
            return read_image(files.read(names[item]), resolution)
        except UsageError as e:
            if options.on_bad == 'error':
                raise UsageError(
                    f'{names[item]!r} in {files.path!r} {e}; replace it, or skip it with --on-bad'
                    ' skip'
                ) from e
            return str(e)

    write_shards(
        ShardWriter(out, job),
        len(names),
        options.shard_size,
        options.batch_size,
        _encode_images(
            read, latents, options.torch_dtype, names, texts, prompt_encoder, numbers, workers
        ),
        prompt_encoder and (lambda: prompt_encoder.store([''])),
        'image',
    )


def _encode_images(
    read: Callable[[int], Tensor | str],
    latents: LatentEncoder,
    dtype: torch.dtype,
    names: Sequence[str],
    captions: Sequence[str],
    prompts: PromptEncoder | None,
    labels: Sequence[int],
    workers: int,
) -> Callable[[list[int]], tuple[dict[str, Tensor], list[list[str]]]]:
    """What :func:`write_shards` calls for a batch of items; ``read`` gives a picture, or why there
    is none."""
    pool = ThreadPoolExecutor(max(1, workers))

    def encode(items: list[int]) -> tuple[dict[str, Tensor], list[list[str]]]:
        found = list(zip(items, pool.map(read, items)))
        skipped = [[names[item], image] for item, image in found if isinstance(image, str)]
        good = [(item, image) for item, image in found if not isinstance(image, str)]
        if not good:
            return {}, skipped
        images = torch.stack([image for _, image in good])
        tensors = dict(x_0=latents.encode(images).to('cpu', dtype))
        if prompts is not None:
            tensors.update(prompts.store([captions[item] for item, _ in good]))
        if labels:
            tensors[LABELS] = torch.tensor([labels[item] for item, _ in good])
        return tensors, skipped

    return encode


def _open_vae(model: str, alone: bool) -> LatentEncoder:
    if alone:
        return KLEncoder(model, 'VAE', subfolder='')
    return find(model).latent_encoder(model)


def _open_encoder(model: str, options: CacheOptions, more: dict[str, Any]) -> PromptEncoder:
    encoder = find(model).encoder(model, dtype=DTYPES[options.dtype], **more)
    return encoder.to(options.device)


def _describe(encoder: PromptEncoder) -> dict[str, dict]:
    """What a manifest says of an encoder of prompts."""
    return dict(
        identity=on_main(lambda: identity_of(encoder)),
        settings=dict(encoder.settings),
        layout=encoder.layout,
        conditions=encoder.conditions,
    )


def _say_skipped(skipped: list, unit: str) -> None:
    if skipped and rank_and_size()[0] == 0:
        print(f'{len(skipped)} {unit} are left out; the manifest lists them', flush=True)
