# Copyright (c) mmfgm authors.
"""A complete FLUX.1 of random weights, in diffusers' folder format, small enough for a test."""

import os

import torch

from tests.tiny_sd3 import _clip_config, _clip_tokenizer, _t5_config, _t5_tokenizer

CONFIG = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    axes_dims_rope=(4, 6, 6),
)


def make_tiny_flux(folder, dev=True, seed=0):
    """Save a random ``FluxPipeline`` to ``folder`` and return the folder as a string.

    Its transformer takes latents ``(4, h, w)``, two pixels each (16 and 8 in the published models),
    prompt embeddings ``(L, 32)`` and pooled embeddings ``(16,)``.

    Args:
        folder (Path or str): Made if it is missing.
        dev (bool): With guidance as an input, and times shifted by the number of tokens; else as
            schnell.
        seed (int): Of the weights; the tokenizers are always the same.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextModel, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(**CONFIG, guidance_embeds=dev)
        clip = CLIPTextModel(_clip_config(16, 16)).eval()
        t5 = T5EncoderModel(_t5_config()).eval()
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
    # mu grows from 0.5 to 1.15 between so many tokens, fewer than the published 256 and 4096
    dynamic = dict(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**(dynamic if dev else dict(shift=1.0))),
        vae=vae,
        text_encoder=clip,
        tokenizer=_clip_tokenizer('<|endoftext|>'),
        text_encoder_2=t5,
        tokenizer_2=_t5_tokenizer(),
    )
    pipeline.save_pretrained(os.fspath(folder))
    return os.fspath(folder)
