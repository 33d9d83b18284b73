# Copyright (c) mmfgm authors.
"""Encode images with Stable Diffusion 3's VAE, and their captions with its text encoders, once, for
training without them.

IMAGES is a folder, a .zip, or webdataset shards: a .tar or a folder of them. Every image is turned
    upright as its EXIF says,
made RGB, resized (bicubic, antialiased) so that its shorter side has --resolution pixels, which
enlarges smaller ones, and cut to the square in its centre: what is outside is lost. The latents are
    (mean - shift_factor) * scaling_factor of the VAE's
distribution, computed in float32. A 1024-pixel image takes 0.52 MB in bf16, a 512-pixel one 0.13
MB; for captions see cache_prompts.py. A run that is killed goes on where it stopped. Several
processes share the work, as there.
"""

import argparse
import hashlib
import io
import json
import os
import os.path as osp
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from mmengine.dist import is_main_process
from PIL import Image, ImageOps
from torch import Tensor

from mmfgm.caches import identity_of
from mmfgm.datasets.images import SUFFIXES
from mmfgm.errors import UsageError
from mmfgm.models.families import LatentEncoder, PromptEncoder, find
from mmfgm.processes import on_main

from .cache_prompts import read_prompts
from .caching import (
    DTYPES,
    ShardWriter,
    add_caching_arguments,
    encoder_options,
    keep_good,
    run_job,
    start,
)
from .cli import run_tool


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', help='a folder or .zip of images, a .tar or a folder of .tar')
    parser.add_argument(
        '--resolution', type=int, default=1024, help='pixels of a side (default: 1024)'
    )
    parser.add_argument(
        '--captions',
        metavar='FILE',
        help=(
            'a .jsonl of {"file_name": ..., "text": ...}, or "txt" for a '
            'KEY.txt beside each KEY.jpg, as in webdataset'
        ),
    )
    parser.add_argument(
        '--workers', type=int, default=4, help='threads that decode images (default: 4)'
    )
    add_caching_arguments(parser)
    return parser.parse_args(argv)


class Files:
    """The files below a folder, in a ``.zip``, or in ``.tar`` shards, by their sorted relative
    names.

    Raises:
        UsageError: If there are none, or an archive is damaged.
    """

    def __init__(self, path: str):
        self.path, self.zip, self.tars = path, None, {}
        try:
            if osp.isdir(path):
                names = [
                    osp.relpath(osp.join(root, name), path).replace(os.sep, '/')
                    for root, _, files in os.walk(path, followlinks=True)
                    for name in files
                ]
                self.sizes = {name: osp.getsize(osp.join(path, name)) for name in names}
                tars = [osp.join(path, name) for name in sorted(names) if name.endswith('.tar')]
                if tars and not any(name.lower().endswith(SUFFIXES) for name in names):
                    self._index(tars)
            elif path.endswith('.tar'):
                self._index([path])
            else:
                self.zip = zipfile.ZipFile(path)
                self.sizes = {info.filename: info.file_size for info in self.zip.infolist()}
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as e:
            raise UsageError(
                f'images come from a folder, a .zip, a .tar or a folder of .tar, but {path!r}'
                f' cannot be read as one: {e}'
            ) from e
        self.images = sorted(
            name
            for name in self.sizes
            if name.lower().endswith(SUFFIXES) and not name.split('/')[-1].startswith('.')
        )
        if not self.images:
            raise UsageError(f'{path!r} holds no images; expected are {", ".join(SUFFIXES)} files')

    def _index(self, tars: Sequence[str]) -> None:
        """Remember where each file lies, so that any can be read without the ones before it."""
        for tar in tars:
            prefix = '' if tar == self.path else f'{osp.relpath(tar, self.path)}/'
            with tarfile.open(tar, 'r:') as f:
                self.tars.update(
                    {
                        prefix + member.name: (tar, member.offset_data, member.size)
                        for member in f
                        if member.isfile()
                    }
                )
        self.sizes = {name: size for name, (_, _, size) in self.tars.items()}

    def read(self, name: str) -> bytes:
        if self.zip is not None:
            return self.zip.read(name)
        if self.tars:
            tar, offset, size = self.tars[name]
            with open(tar, 'rb') as f:
                f.seek(offset)
                return f.read(size)
        with open(osp.join(self.path, name), 'rb') as f:
            return f.read()


def read_image(content: bytes, resolution: int) -> Tensor:
    """Pixels ``(3, resolution, resolution)`` in [-1, 1]: shorter side resized, centre cut out.

    Raises:
        UsageError: If it is damaged, or has more than 8 bits a channel.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode.startswith(('I', 'F')):  # which PIL would clip
            raise ValueError(f'mode {image.mode}, expected are 8-bit images')
        image = image.convert('RGB')
    except Exception as e:  # a damaged file can raise anything
        raise UsageError(f'cannot be read as an image ({e})') from e
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + resolution, top + resolution)
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def read_captions(files: Files, source: str) -> list[str | None]:
    """The caption of each image, None where there is none."""
    if source == 'txt':
        names = [f'{osp.splitext(name)[0]}.txt' for name in files.images]
        return [
            files.read(name).decode('utf-8', 'replace').strip() if name in files.sizes else None
            for name in names
        ]
    names, texts = (read_prompts(source, column)[1] for column in ('file_name', 'text'))
    captions = dict(zip(map(str, names), texts))
    unknown = [name for name in captions if name not in files.sizes]
    if unknown:
        raise UsageError(
            f'{source!r} has captions for {len(unknown)} files that are not in {files.path!r}, such'
            f' as {unknown[0]!r}; file_name is relative to it'
        )
    return [captions.get(name) for name in files.images]


def make_encode(
    args: argparse.Namespace,
    latents: LatentEncoder,
    files: Files,
    names: Sequence[str],
    captions: Sequence[str],
    encoder: PromptEncoder | None,
) -> Callable[[list[int]], tuple[dict[str, Tensor], list[list]]]:
    """What :func:`run_job` calls for a batch of items."""
    pool = ThreadPoolExecutor(max(1, args.workers))
    dtype = getattr(torch, DTYPES[args.dtype])

    def read(item):
        try:
            return read_image(files.read(names[item]), args.resolution)
        except UsageError as e:
            if args.on_bad == 'error':
                raise UsageError(
                    f'{names[item]!r} in {files.path!r} {e}; replace it, or skip it with --on-bad'
                    ' skip'
                ) from e
            return str(e)

    @torch.no_grad()
    def encode(items):
        images = list(pool.map(read, items))
        skipped = [
            [names[item], image] for item, image in zip(items, images) if isinstance(image, str)
        ]
        items, images = (
            [item for item, image in zip(items, images) if not isinstance(image, str)],
            [image for image in images if not isinstance(image, str)],
        )
        if not images:
            return {}, skipped
        tensors = dict(x_0=latents.encode(torch.stack(images)).to('cpu', dtype))
        if encoder is not None:
            tensors.update(encoder.store([captions[item] for item in items]))
        return tensors, skipped

    return encode


def cache_latents(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    args = parse_args(argv)
    device = start(args)
    family = find(args.model)
    latents = family.latent_encoder(args.model).to(device)
    if args.resolution < 1 or args.resolution % latents.factor:
        raise UsageError(
            f'--resolution must be a multiple of the {latents.factor} pixels of a latent, but is'
            f' {args.resolution}'
        )
    files = (
        on_main(lambda: Files(args.images))
        if not args.images.endswith('.zip')
        else Files(args.images)
    )
    names, captions, skipped, encoder = files.images, [''] * len(files.images), [], None
    side = args.resolution // latents.factor
    identity, layout = (
        on_main(lambda: identity_of(latents)),
        dict(x_0=[latents.channels, side, side]),
    )
    settings = dict(
        dtype=DTYPES[args.dtype],
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        resolution=args.resolution,
        aspect='shorter side to resolution, centre crop',
        **latents.settings,
    )
    if args.captions:
        encoder = family.encoder(args.model, **encoder_options(args)).to(device)
        about = dict(
            identity=on_main(lambda: identity_of(encoder)),
            layout=encoder.layout,
            settings=encoder.settings,
        )
        captions = on_main(lambda: read_captions(files, args.captions))
        bad = on_main(lambda: encoder.bad(captions))
        skipped = on_main(
            lambda: keep_good([f'caption of {name}' for name in names], bad, args.on_bad)
        )
        names, captions = (
            [value for i, value in enumerate(values) if i not in bad]
            for values in (names, captions)
        )
        identity, layout, settings = (
            {**a, **b}
            for a, b in (
                (identity, about['identity']),
                (layout, about['layout']),
                (settings, about['settings']),
            )
        )
    listing = json.dumps(
        [[name, files.sizes[name], caption] for name, caption in zip(names, captions)]
    )
    job = dict(
        kind='latents',
        identity=identity,
        settings=settings,
        layout=layout,
        conditions=encoder.conditions if encoder else {},
        source=dict(
            count=len(names), sha256=hashlib.sha256(listing.encode()).hexdigest(), skipped=skipped
        ),
    )
    if skipped and is_main_process():
        print(f'{len(skipped)} images are left out; the manifest lists them', flush=True)
    run_job(
        ShardWriter(args.out, job),
        len(names),
        args.shard_size,
        args.batch_size,
        make_encode(args, latents, files, names, captions, encoder),
        encoder and (lambda: encoder.store([''])),
        'image',
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_tool(cache_latents, argv)


if __name__ == '__main__':
    main()
