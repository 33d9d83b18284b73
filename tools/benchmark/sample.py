# Copyright (c) mmfgm authors.
r"""What FGMInferencer costs above the calls of the networks, and what one step saves against the
teacher's many.

The bare side calls text encoders, generator and VAE by hand, with noise drawn beforehand. Both
sides take turns, so that other load on the machine meets both alike, and must make the same images.
Then the teacher makes the batch with guidance. Prints median seconds of each, and the ratios;
without a GPU those are of the process's CPU time, which other load is not in.

Without CONFIG, a Stable Diffusion 3 of random weights is made: --width, --depth and --latent-size
set how long a call takes; its VAE and text encoders stay tiny.

    python tools/benchmark/sample.py [CONFIG [WEIGHTS]] [--batch-size 8] [--repeats 5] [--nfe 28]
"""

import argparse
import os.path as osp
import sys
import tempfile
import time
from functools import partial

import torch
from mmengine.config import Config

# the tiny Stable Diffusion 3 is the tests'
sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmfgm.apis import FGMInferencer
from tests.tiny_sd3 import make_tiny_sd3


def random_sd3(folder, args):
    """A pipeline folder, the config of a distillation of it, and a checkpoint of its generator."""
    from diffusers import SD3Transformer2DModel

    make_tiny_sd3(folder)
    transformer = SD3Transformer2DModel(
        sample_size=args.latent_size,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=args.depth,
        attention_head_dim=64,
        num_attention_heads=args.width // 64,
        joint_attention_dim=32,
        caption_projection_dim=args.width,
        pooled_projection_dim=64,
        pos_embed_max_size=args.latent_size // 2,
    )
    transformer.save_pretrained(osp.join(folder, 'transformer'))
    cfg = Config(
        dict(
            model=dict(
                type='FGM',
                network=dict(type='SD3', pretrained=folder, latent_size=args.latent_size),
                teacher=dict(checkpoint=None),
                generator=dict(t_star=0.97, c_in=0.8),
                guidance=dict(scale=7.0, null=dict(type='ZeroPrompt')),
                decoder=dict(type='LatentDecoder', pretrained=folder),
            )
        )
    )
    weights = osp.join(folder, 'trained.pth')
    torch.save(
        {
            f'generator_ema.network.transformer.{key}': value
            for key, value in transformer.state_dict().items()
        },
        weights,
    )
    return cfg, weights


def seconds_of(call, device):
    """Wall time, the time to compare by, and the result."""
    clocks = (time.perf_counter, time.perf_counter if device.type == 'cuda' else time.process_time)
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = [clock() for clock in clocks]
    result = call()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return torch.tensor([clock() - began for clock, began in zip(clocks, start)]), result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?')
    parser.add_argument('weights', nargs='?')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--nfe', type=int, default=28, help="the teacher's (default: 28)")
    parser.add_argument('--guidance', type=float, default=7.0)
    parser.add_argument('--shift', type=float, default=3.0)
    parser.add_argument('--precision', choices=['fp32', 'bf16'], default='fp32')
    parser.add_argument('--width', type=int, default=256)
    parser.add_argument('--depth', type=int, default=4)
    parser.add_argument('--latent-size', type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = (args.config, args.weights) if args.config else random_sd3(folder, args)
        inferencer = FGMInferencer(*model, precision=args.precision)
        measure(inferencer, args)


@torch.no_grad()
def measure(inferencer, args):
    """Print the table."""
    n, device, model = args.batch_size, inferencer.device, inferencer.model
    rounds = iter(range(10**9))

    def inputs():
        """Prompts that were not encoded before."""
        fresh = [f'a red cat {next(rounds)}' for _ in range(n)]
        return dict(prompts=fresh, labels=[0] * n, nothing=n)[inferencer.condition]

    seeds, name = list(range(n)), inferencer.networks[0]
    generator, z = model.networks[name], model.sampler.noise(seeds).to(device)

    def encode(given):
        if inferencer.condition == 'prompts':
            return inferencer.text_encoder.encode(given)
        return (
            dict(labels=torch.tensor(given, device=device))
            if inferencer.condition == 'labels'
            else {}
        )

    def bare(cond):
        with model.precision():
            samples = generator(z, **{key: value.to(device) for key, value in cond.items()})
        return samples if model.decoder is None else model.decoder(samples)

    def ours(given, out='pil', **options):
        return inferencer(given, seeds, batch_size=n, out=out, **options)['predictions']

    same = inputs()
    torch.testing.assert_close(
        torch.stack(ours(same, 'tensor')), bare(encode(same)).cpu(), rtol=1e-4, atol=1e-4
    )
    times = dict(encoders=[], network=[], inferencer=[])
    for _ in range(args.repeats):
        given = inputs()
        spent, cond = seconds_of(partial(encode, given), device)
        times['encoders'].append(spent)
        times['network'].append(seconds_of(partial(bare, cond), device)[0])
        times['inferencer'].append(seconds_of(partial(ours, given), device)[0])
    median = {key: torch.stack(values).median(0).values for key, values in times.items()}
    parameters = sum(p.numel() for p in generator.parameters())
    print(
        f'{name}, {parameters / 1e6:.1f} M parameters, batch of {n}, {args.precision}, {device},'
        f' torch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.repeats}'
    )
    print(f'  network and VAE by hand          {median["network"][0]:8.4f} s')
    print(f'  text encoders by hand            {median["encoders"][0]:8.4f} s')
    print(f'  FGMInferencer, to PIL images     {median["inferencer"][0]:8.4f} s')
    for title, base in (
        ('network and VAE', median['network']),
        ('all three by hand', median['network'] + median['encoders']),
    ):
        print(
            f'  overhead above {title + ":":18s}'
            f' {100 * float(median["inferencer"][1] / base[1] - 1):8.2f} %'
        )
    if 'teacher' in inferencer.networks:
        steps = dict(network='teacher', nfe=args.nfe, shift=args.shift, guidance=args.guidance)
        ours(same, **{**steps, 'nfe': 1})  # builds and loads
        slow, _ = seconds_of(lambda: ours(inputs(), **steps), device)
        print(
            f'  teacher, {args.nfe} steps with guidance {slow[0]:8.4f} s:'
            f' {float(slow[1] / median["inferencer"][1]):.1f} times one step'
        )


if __name__ == '__main__':
    main()
