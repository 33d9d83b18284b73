# Copyright (c) mmfgm authors.
"""How many prompts and latents a process's loader reads in a second, beside what a GPU eats.

Simulates the caches of Stable Diffusion 3 with as many items as asked for: one shard each of random
values, linked under the name of every other shard, so that millions of items take the disk of a few
hundred. All reads but the first come from the page cache, so this is what our own reading costs,
checksums included; what a disk adds, its data sheet says (the MB/s that are printed are needed).

    python tools/benchmark/data.py --items 2000000 --workers 2 --seconds 21.5 --eats 48

``--seconds`` and ``--eats`` are the time of an iteration, which tools/rehearse.py predicts, and the
items that one GPU reads in it: batch size x accumulation x updates.
"""

import argparse
import os
import os.path as osp
import tempfile
import time

import torch
from mmengine.runner import Runner

from mmfgm.caches.writer import ShardWriter
from mmfgm.datasets import collate
from mmfgm.registry import DATASETS

SHARD = 128
LAYOUT = dict(clip=[77, 2048], t5=[256, 4096], pooled=[2048])
CONDITIONS = dict(prompt_embeds=['clip', 't5'], pooled_embeds=['pooled'])


def simulate(path: str, kind: str, items: int, tokens: int | None, latent: list[int]) -> None:
    """A cache of ``items`` whose shards are one, with ``tokens`` words each where padding is
    dropped."""
    layout = LAYOUT if kind == 'prompts' else dict(LAYOUT, x_0=latent)
    job = dict(
        kind=kind,
        identity={},
        source='simulated',
        settings=dict(dtype='bfloat16', resolution=8 * latent[-1]),
        layout=layout,
        conditions=CONDITIONS,
    )
    writer = ShardWriter(path, job)
    writer.begin()
    values = {
        name: torch.randn(SHARD, *shape).to(torch.bfloat16)
        for name, shape in layout.items()
        if name != 't5' or tokens is None
    }
    if tokens is not None:
        values['t5'] = torch.randn(SHARD * tokens, LAYOUT['t5'][1]).to(torch.bfloat16)
        values['t5_tokens'] = torch.full((SHARD,), tokens)
    names = [writer.name(number) for number in range(-(-items // SHARD))]
    writer.write(names[0], values, SHARD)
    for name in names[1:]:
        os.link(osp.join(path, names[0]), osp.join(path, name))
        entry = open(osp.join(path, f'{names[0]}.json')).read().replace(names[0], name)
        open(osp.join(path, f'{name}.json'), 'w').write(entry)
    writer.finish(names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--items', type=int, default=2_000_000)
    parser.add_argument('--tokens', type=int, help='T5 tokens that are words (default: padding)')
    parser.add_argument('--latent', type=int, default=128, help='height and width (default: 128)')
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--batches', type=int, default=200)
    parser.add_argument('--seconds', type=float, help='of an iteration of the training')
    parser.add_argument('--eats', type=int, help='items that one GPU reads in it')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts, latents = osp.join(folder, 'prompts'), osp.join(folder, 'latents')
        shape = [16, args.latent, args.latent]
        simulate(prompts, 'prompts', args.items, args.tokens, shape)
        simulate(latents, 'latents', args.items, args.tokens, shape)
        start = time.perf_counter()
        loader = Runner.build_dataloader(
            dict(
                batch_size=args.batch_size,
                num_workers=args.workers,
                sampler=dict(type='InfiniteSampler', shuffle=True),
                collate_fn=dict(type=collate),
                dataset=DATASETS.build(
                    dict(
                        type='mmfgm.WithReal',
                        conditions=dict(type='mmfgm.CachedPrompts', path=prompts),
                        real=dict(type='mmfgm.CachedLatents', path=latents),
                    )
                ),
            ),
            seed=0,
        )
        batches = iter(loader)
        batch = next(batches)
        opened = time.perf_counter() - start
        real = batch['real']
        read = sum(x.nbytes for x in (*batch['cond'].values(), real['x_0'], *real['cond'].values()))
        next(batches)
        start = time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        took = time.perf_counter() - start
    rate = args.batches * args.batch_size / took
    each = read / args.batch_size
    print(f'{args.items} items in {-(-args.items // SHARD)} shards, opened in {opened:.1f} s')
    print(
        f'{rate:.0f} items a second of {each / 1e6:.2f} MB each ({rate * each / 1e6:.0f} MB/s),'
        f' by {args.workers} workers'
    )
    if args.seconds and args.eats:
        needed = args.eats / args.seconds
        print(
            f'a GPU eats {needed:.2f} items a second ({needed * each / 1e6:.1f} MB/s); the loader'
            f' is {rate / needed:.0f} times as fast'
        )


if __name__ == '__main__':
    main()
