# Copyright (c) mmfgm authors.
"""A complete Stable Diffusion 3 of random weights, in diffusers' folder format, small enough for a
test."""

import os

import torch

WORDS = (
    'a an the red green blue cat dog bird house tree on in of with and photo painting small large'
).split()
# what Stable Diffusion 3.5 medium adds: norms of queries and keys, and a second attention of the
# image alone in some blocks
SD35 = dict(qk_norm='rms_norm', dual_attention_layers=(0,))
FACTOR = 2  # pixels per latent; 8 in the published models


def make_tiny_sd3(folder, seed=0, sample_size=8, **transformer_config):
    """Save a random ``StableDiffusion3Pipeline`` to ``folder`` and return the folder as a string.

    Its transformer takes latents ``(16, sample_size, sample_size)``, prompt embeddings ``(77 + T5
    tokens, 32)`` and pooled embeddings ``(64,)``. CLIP's embeddings have 8 + 16 channels, so 8 are
    padding, as 2,048 of 4,096 are in SD3.

    Args:
        folder (Path or str): Made if it is missing.
        seed (int): Of the weights; the tokenizers are always the same.
        sample_size (int): Height and width of the latents; images have twice as many pixels.
        **transformer_config: Of the transformer, such as :data:`SD35`.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=sample_size,
            **transformer_config,
        )
        clip_l, clip_g = (
            CLIPTextModelWithProjection(_clip_config(hidden, projection)).eval()
            for hidden, projection in ((8, 24), (16, 40))
        )
        t5 = T5EncoderModel(_t5_config()).eval()
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=16,
            down_block_types=('DownEncoderBlock2D',) * 2,
            up_block_types=('UpDecoderBlock2D',) * 2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5305,
        )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_l,
        tokenizer=_clip_tokenizer('<|endoftext|>'),
        text_encoder_2=clip_g,
        tokenizer_2=_clip_tokenizer('!'),
        text_encoder_3=t5,
        tokenizer_3=_t5_tokenizer(),
    )
    pipeline.save_pretrained(os.fspath(folder))
    return os.fspath(folder)


def _clip_vocab():
    """Byte-level BPE without merges: a token for each lower-case letter, inside and at the end of a
    word."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocab = {
        token: index
        for index, token in enumerate([*letters, *(f'{letter}</w>' for letter in letters)])
    }
    return {**vocab, '<|startoftext|>': len(vocab), '<|endoftext|>': len(vocab) + 1}


def _clip_tokenizer(pad_token):
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_clip_vocab(), merges=[], pad_token=pad_token, model_max_length=77)


def _clip_config(hidden, projection):
    from transformers import CLIPTextConfig

    ids = _clip_vocab()
    return CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act='gelu',
        max_position_embeddings=77,
        bos_token_id=ids['<|startoftext|>'],
        eos_token_id=ids['<|endoftext|>'],
        pad_token_id=ids['<|endoftext|>'],
    )


def _t5_tokenizer():
    from transformers import T5TokenizerFast

    letters = [chr(code) for code in range(97, 123)]
    vocab = [
        ('<pad>', 0.0),
        ('</s>', 0.0),
        ('<unk>', 0.0),
        ('▁', -2.0),
        *((f'▁{word}', -1.0) for word in WORDS if len(word) > 1),
        *((letter, -3.0) for letter in letters),
    ]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def _t5_config():
    from transformers import T5Config

    return T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        is_encoder_decoder=False,
        feed_forward_proj='gated-gelu',
    )
