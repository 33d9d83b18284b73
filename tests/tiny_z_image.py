# Copyright (c) mmfgm authors.
"""A complete Z-Image of random weights, in diffusers' folder format, small enough for a test."""

import os

import torch

from tests.tiny_qwen import make_tokenizer, vary, vocabulary

CONFIG = dict(
    in_channels=4,
    dim=32,
    n_layers=3,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=24,
    axes_dims=[4, 6, 6],
    axes_lens=[640, 16, 16],
)


def make_tiny_z_image(folder, seed=0):
    """Save a random ``ZImagePipeline`` to ``folder`` and return the folder as a string.

    Its transformer takes latents of 4 channels, of up to 32 x 32, and embeddings of 24; images
    have 8 pixels per latent, as in the published model.

    Args:
        folder (Path or str): Made if it is missing.
        seed (int): Of the weights; the tokenizer is always the same.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = vary(ZImageTransformer2DModel(**CONFIG))
        text_encoder = vary(
            Qwen3Model(
                Qwen3Config(
                    vocab_size=len(vocabulary()),
                    hidden_size=24,
                    intermediate_size=32,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                )
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=('DownEncoderBlock2D',) * 4,
            up_block_types=('UpDecoderBlock2D',) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        )
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(),
    )
    pipeline.save_pretrained(os.fspath(folder))
    return os.fspath(folder)
