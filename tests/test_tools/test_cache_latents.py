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
from mmfgm.models import LatentDecoder
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


@pytest.fixture
def vae(tmp_path):
    """A VAE published alone, with the scale of Stable Diffusion's first one and no shift."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
    ).eval()
    assert vae.config.scaling_factor == 0.18215 and vae.config.shift_factor is None
    vae.save_pretrained(tmp_path / 'sd-vae')
    return vae, str(tmp_path / 'sd-vae')


@pytest.fixture
def classes(tmp_path):
    """Five images in the folders of three classes, whose order in the file system is another."""
    rng, root = np.random.default_rng(0), tmp_path / 'train'
    names = ['n02/b.JPEG', 'n01/x.JPEG', 'n03/deep/a.JPEG', 'n02/a.JPEG', 'n01/a.JPEG']
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            root / name, format='PNG'
        )
    return root, sorted(names)


ALONE = ('--vae-only', *LATENTS)


def test_labels_are_the_folders_numbers_beside_a_vae_alone(vae, classes, tmp_path):
    network, path = vae
    root, names = classes
    out = str(tmp_path / 'out')
    # the last one wins
    options = (*ALONE, '--dtype', 'bf16', '--labels', 'folders')
    cache_latents([str(root), out, '--model', path, *options])
    cache = CachedLatents(out, (4, 8, 8), prompts=False, labels=True, verify=True)
    batch = cache.__getitems__(range(5))
    assert batch['cond']['labels'].dtype == torch.int64
    assert batch['cond']['labels'].tolist() == [0, 0, 1, 1, 2]
    assert cache.manifest['classes'] == ['n01', 'n02', 'n03']
    pixels = torch.stack([read_image((root / name).read_bytes(), 16) for name in names])
    with torch.no_grad():
        mean = torch.cat([network.encode(part).latent_dist.mean for part in pixels.split(2)])
    # float32, as noise is added to it
    assert torch.equal(batch['x_0'], (mean * 0.18215).bfloat16().float())
    # and back, as model.decoder of the config does
    decoder = LatentDecoder(path, subfolder='')
    with torch.no_grad():
        images = network.decode(batch['x_0'] / 0.18215).sample
    torch.testing.assert_close(decoder(batch['x_0']), images)
    # nobody gets them who does not ask
    assert CachedLatents(out, prompts=False).__getitems__([0])['cond'] == {}


def test_labels_of_edms_json_and_of_tars(vae, classes, tmp_path):
    _, path = vae
    root, names = classes
    # bf16, the dtype of the latents, has no 999
    table = dict(zip(names, (999, 0, 1, 1, 2)))
    (root / 'dataset.json').write_text(json.dumps(dict(labels=list(table.items()))))
    out = str(tmp_path / 'json')
    options = (*ALONE, '--dtype', 'bf16', '--labels', 'json')
    cache_latents([str(root), out, '--model', path, *options])
    found = CachedLatents(out, prompts=False, labels=True).__getitems__(range(5))
    assert found['cond']['labels'].tolist() == [999, 0, 1, 1, 2]
    # ImageNet's archive: a tar for each class
    (tmp_path / 'tars').mkdir()
    for name in ('n01', 'n02', 'n03'):
        with tarfile.open(tmp_path / f'tars/{name}.tar', 'w') as f:
            for file in (root / name).rglob('*.JPEG'):
                f.add(file, file.name)
    out = str(tmp_path / 'tarred')
    cache_latents([str(tmp_path / 'tars'), out, '--model', path, *ALONE, '--labels', 'folders'])
    found = CachedLatents(out, prompts=False, labels=True).__getitems__(range(5))
    assert found['cond']['labels'].tolist() == [0, 0, 1, 1, 2]


def test_labels_of_images_that_are_left_out_go_with_them(vae, classes, tmp_path):
    _, path = vae
    root, names = classes
    (root / names[1]).write_bytes(b'no image')
    out = str(tmp_path / 'out')
    options = (*ALONE, '--labels', 'folders', '--on-bad', 'skip')
    cache_latents([str(root), out, '--model', path, *options])
    found = CachedLatents(out, prompts=False, labels=True).__getitems__(range(4))
    assert found['cond']['labels'].tolist() == [0, 1, 1, 2]


def test_bad_labels(vae, classes, tmp_path):
    _, path = vae
    root, _ = classes

    def cache(source, *options):
        cache_latents([str(source), str(tmp_path / 'out'), '--model', path, *ALONE, *options])

    with pytest.raises(UsageError, match="found all images in 'train'"):
        with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as f:
            for file in root.rglob('*.JPEG'):
                f.write(file, file.relative_to(tmp_path))
        cache(tmp_path / 'train.zip', '--labels', 'folders')
    with pytest.raises(UsageError, match=r'dataset\.json is missing or has no labels'):
        cache(root, '--labels', 'json')
    with pytest.raises(UsageError, match='is a VAE alone'):
        cache(root, '--captions', 'txt')
    Image.new('RGB', (16, 16)).save(root / 'top.png')
    with pytest.raises(UsageError, match=r"found 'top\.png' at the top"):
        cache(root, '--labels', 'folders')
    (root / 'top.png').unlink()
    cache(root)
    with pytest.raises(UsageError, match='has no labels.*--labels'):
        CachedLatents(str(tmp_path / 'out'), prompts=False, labels=True)
    # a cache is not taken up with what it was not begun with
    with pytest.raises(UsageError, match='was begun with something else'):
        cache(root, '--labels', 'folders')
