# Copyright (c) mmfgm authors.
"""A complete Lumina-Image 2.0 of random weights, in diffusers' folder format, small enough for a
test."""

import os

import torch

from tests.tiny_sana import gemma_tokenizer, tiny_gemma2


def make_tiny_lumina2(folder, seed=0, sample_size=4, scheduler=None, **transformer):
    """Save a random ``Lumina2Pipeline`` to ``folder`` and return the folder as a string.

    Args:
        folder (Path or str): Made if it is missing.
        seed (int): Of the weights; the tokenizer is always the same.
        sample_size (int): Height and width of the latents; images have twice as many pixels.
        scheduler (SchedulerMixin, optional): Defaults to the published one.
        **transformer: Other arguments of the transformer.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
    )

    sizes = dict(
        sample_size=sample_size,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 8, 8),
        cap_feat_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Lumina2Transformer2DModel(**{**sizes, **transformer})
        text_encoder = tiny_gemma2()
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            down_block_types=('DownEncoderBlock2D',) * 2,
            up_block_types=('UpDecoderBlock2D',) * 2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        )
    pipeline = Lumina2Pipeline(
        transformer=network,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=gemma_tokenizer(),
    )
    pipeline.save_pretrained(os.fspath(folder))
    return os.fspath(folder)
