# Copyright (c) mmfgm authors.
"""A complete Qwen-Image of random weights, in diffusers' folder format, small enough for a test."""

import os

import torch

from tests.tiny_qwen import make_tokenizer, vary, vocabulary

CONFIG = dict(
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    axes_dims_rope=(4, 6, 6),
)
MEAN, STD = [0.1, -0.2, 0.3, 0.5], [1.5, 0.5, 2.0, 0.8]


def make_tiny_qwen_image(folder, seed=0):
    """Save a random ``QwenImagePipeline`` to ``folder`` and return the folder as a string.

    Its transformer takes latents of 4 channels and embeddings of 24; images have 8 pixels per
    latent, and the scheduler's values are those of the published model.

    Args:
        folder (Path or str): Made if it is missing.
        seed (int): Of the weights; the tokenizer is always the same.
    """
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(
        vocab_size=len(vocabulary()),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=dict(rope_type='default', mrope_section=[2, 2, 2], rope_theta=1e6),
        bos_token_id=None,
        eos_token_id=None,
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = vary(QwenImageTransformer2DModel(**CONFIG))
        text_encoder = vary(
            Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision)
            )
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=MEAN,
            latents_std=STD,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    pipeline = QwenImagePipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(),
    )
    pipeline.save_pretrained(os.fspath(folder))
    return os.fspath(folder)
