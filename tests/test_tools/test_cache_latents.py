# Copyright (c) mmfgm authors.
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from mmfgm.caches import identify, read_image
from mmfgm.datasets import CachedLatents, CachedPrompts
from mmfgm.errors import UsageError
from mmfgm.tools.cache_latents import cache_latents
from tests.test_tools.test_caches import PROMPTS, SMALL, encode, sd3  # noqa: F401


@pytest.fixture
def images(tmp_path):
    """Five images of several sizes, with captions, of which the last is smaller than the
    resolution."""
    rng, root = np.random.default_rng(0), tmp_path / 'images'
    (root / 'sub').mkdir(parents=True)
    names = ['a.png', 'b.png', 'c.png', 'sub/d.png', 'sub/e.png']
    for name, size, caption in zip(
        names, ((16, 16, 3), (40, 24, 3), (20, 33, 3), (64, 64, 3), (9, 12, 3)), PROMPTS
    ):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / name)
        (root / name).with_suffix('.txt').write_text(caption)
    (tmp_path / 'captions.jsonl').write_text(
        ''.join(
            json.dumps(dict(file_name=name, text=caption)) + '\n'
            for name, caption in zip(names, PROMPTS)
        )
    )
    return root, names


LATENTS = ('--resolution', '16', '--dtype', 'fp32', *SMALL)


def test_latents_are_the_vaes_mean_shifted_and_scaled(sd3, images, tmp_path):
    root, names = images
    out = tmp_path / 'out'
    cache_latents(
        [
            str(root),
            str(out),
            '--model',
            sd3,
            '--captions',
            str(tmp_path / 'captions.jsonl'),
            *LATENTS,
        ]
    )
    vae = AutoencoderKL.from_pretrained(sd3, subfolder='vae')
    pixels = torch.stack([read_image((root / name).read_bytes(), 16) for name in names])
    assert torch.equal(
        pixels[0],
        torch.from_numpy(np.array(Image.open(root / 'a.png'))).permute(2, 0, 1) / 127.5 - 1,
    )
    with torch.no_grad():
        mean = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(2)])
    cache = CachedLatents(str(out), (16, 8, 8), identity=dict(vae=identify(vae)), verify=True)
    batch = cache.__getitems__(range(5))
    assert torch.equal(batch['x_0'], (mean - 0.0609) * 1.5305) and len(cache) == 5
    embeds, pooled, _ = encode(sd3, PROMPTS)
    assert torch.equal(batch['cond']['prompt_embeds'], embeds) and torch.equal(
        batch['cond']['pooled_embeds'], pooled
    )
    assert torch.equal(cache.null['prompt_embeds'], encode(sd3, [''])[0][0])
    assert (
        cache.manifest['settings']['shift_factor'] == 0.0609
        and cache.manifest['settings']['resolution'] == 16
    )
    with pytest.raises(
        UsageError, match=r'latent_shape is \(16, 16, 16\), but the latents of .* are \(16, 8, 8\)'
    ):
        CachedLatents(str(out), (16, 16, 16))
    with pytest.raises(UsageError, match='cache of other models: vae.weights is'):
        CachedLatents(str(out), identity=dict(vae=dict(identify(vae), weights='00000000')))
    with pytest.raises(UsageError, match='is a cache of latents, expected one of prompts'):
        CachedPrompts(str(out))


def test_image_is_resized_and_cut_in_the_middle():
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = 255
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, 'PNG')
    assert torch.equal(read_image(encoded.getvalue(), 30), torch.ones(3, 30, 30))
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    tall, upright = io.BytesIO(), io.BytesIO()
    turned.save(tall, 'PNG', exif=exif)
    turned.rotate(-90, expand=True).save(upright, 'PNG')
    assert torch.equal(read_image(tall.getvalue(), 60), read_image(upright.getvalue(), 60))
    assert not torch.equal(read_image(tall.getvalue(), 60), read_image(encoded.getvalue(), 60))
    half = read_image(encoded.getvalue(), 15)  # antialiased: the edges are grey, the middle is not
    assert half.shape == (3, 15, 15) and torch.equal(half[:, :, 4:11], torch.ones(3, 15, 7))


def test_zip_and_webdataset_give_the_folders_latents(sd3, images, tmp_path):
    root, _ = images
    files = sorted(path for path in root.rglob('*') if path.is_file())
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as f:
        for path in files:
            f.write(path, path.relative_to(root))
    (tmp_path / 'tars').mkdir()
    for number, part in enumerate((files[:6], files[6:])):
        with tarfile.open(tmp_path / f'tars/{number}.tar', 'w') as f:
            for path in part:
                f.add(path, path.relative_to(root))
    batches = []
    for source in (root, tmp_path / 'images.zip', tmp_path / 'tars'):
        out = str(tmp_path / f'out_{source.name}')
        cache_latents([str(source), out, '--model', sd3, '--captions', 'txt', *LATENTS])
        batches.append(CachedLatents(out).__getitems__(range(5)))
    for batch in batches[1:]:
        assert torch.equal(batch['x_0'], batches[0]['x_0'])
        for name, value in batches[0]['cond'].items():
            assert torch.equal(batch['cond'][name], value), name
    with pytest.raises(UsageError, match='cannot be read as one'):
        cache_latents(
            [str(tmp_path / 'captions.jsonl'), str(tmp_path / 'x'), '--model', sd3, *LATENTS]
        )


def test_bad_images_and_captions(sd3, images, tmp_path):
    root, _ = images
    (root / 'b.png').write_bytes((root / 'b.png').read_bytes()[:60])
    out = str(tmp_path / 'out')
    args = [str(root), out, '--model', sd3, *LATENTS]
    with pytest.raises(UsageError, match="'b.png' in .* cannot be read as an image"):
        cache_latents(args)
    cache_latents([*args, '--on-bad', 'skip'])  # goes on where the error was
    cache = CachedLatents(out, prompts=False)
    assert len(cache) == 4 and [shard['count'] for shard in cache.shards] == [1, 2, 1]
    assert cache.shards[0]['skipped'][0][0] == 'b.png'
    expected = (
        read_image((root / 'c.png').read_bytes(), 16),
        read_image((root / 'sub/d.png').read_bytes(), 16),
    )
    with torch.no_grad():
        mean = (
            AutoencoderKL.from_pretrained(sd3, subfolder='vae')
            .encode(torch.stack(expected))
            .latent_dist.mean
        )
    assert torch.equal(cache.__getitems__([1, 2])['x_0'], (mean - 0.0609) * 1.5305)
    with pytest.raises(UsageError, match='has no captions; set prompts=False'):
        CachedLatents(out)
    with pytest.raises(UsageError, match='made without prompts'):
        _ = cache.null
    (root / 'c.txt').unlink()
    with pytest.raises(UsageError, match='1 of 5 .*caption of c.png is empty'):
        cache_latents(
            [str(root), str(tmp_path / 'new'), '--model', sd3, '--captions', 'txt', *LATENTS]
        )
    with pytest.raises(UsageError, match='--resolution must be a multiple of the 2 pixels'):
        cache_latents([*args, '--resolution', '17'])
    with open(tmp_path / 'captions.jsonl', 'a') as f:
        f.write('{"file_name": "z.png", "text": "a"}\n')
    with pytest.raises(UsageError, match="1 files that are not in .*'z.png'"):
        cache_latents([*args, '--captions', str(tmp_path / 'captions.jsonl')])
