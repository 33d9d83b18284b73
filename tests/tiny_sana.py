# Copyright (c) mmfgm authors.
"""A complete SANA of random weights, in diffusers' folder format, small enough for a test."""

import os
import string

import torch

from tests.tiny_sd3 import WORDS


def make_tiny_sana(folder, seed=0, sample_size=4, scheduler=None, **transformer):
    """Save a random ``SanaPipeline`` to ``folder`` and return the folder as a string.

    Args:
        folder (Path or str): Made if it is missing.
        seed (int): Of the weights; the tokenizer is always the same.
        sample_size (int): Height and width of the latents; images have twice as many pixels.
        scheduler (SchedulerMixin, optional): Defaults to DPM-Solver++, as published pipelines have
            it.
        **transformer: Other arguments of the transformer.
    """
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    sizes = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        patch_size=1,
        sample_size=sample_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SanaTransformer2DModel(**{**sizes, **transformer})
        text_encoder = tiny_gemma2()
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=('ResBlock', 'EfficientViTBlock'),
            decoder_block_types=('ResBlock', 'EfficientViTBlock'),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type='Conv',
            upsample_block_type='interpolate',
            decoder_norm_types='rms_norm',
            decoder_act_fns='silu',
            scaling_factor=0.41407,
        )
    pipeline = SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=network,
        scheduler=scheduler
        or DPMSolverMultistepScheduler(
            prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipeline.save_pretrained(os.fspath(folder))
    return os.fspath(folder)


def _vocabulary():
    """Special tokens, printable characters, and the beginnings of a few words."""
    tokens = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>', '▁', '\n']
    tokens += sorted(set(string.printable) - set(string.whitespace))
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merge = (word[: end - 1], word[end - 1])
            if merge not in merges:
                merges.append(merge)
                tokens.append(word[:end])
    return {token: i for i, token in enumerate(tokens)}, merges


def gemma_tokenizer():
    from transformers import GemmaTokenizerFast

    vocab, merges = _vocabulary()
    return GemmaTokenizerFast(vocab=vocab, merges=merges, add_bos_token=True)


def tiny_gemma2(width=16):
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(_vocabulary()[0]),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        max_position_embeddings=2048,
    )
    return Gemma2Model(config).eval()
