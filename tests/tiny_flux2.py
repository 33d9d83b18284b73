# Copyright (c) mmfgm authors.
"""Complete FLUX.2 pipelines of random weights, in diffusers' folder format, small enough for a
test."""

import os

import torch

CONFIG = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    timestep_guidance_channels=256,
    axes_dims_rope=(4, 4, 4, 4),
)
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '[IMG]', '[IMG_BREAK]', '[IMG_END]']
TEMPLATE = (
    '{% for message in messages %}<|im_start|>{% if message.content is string %}'
    '{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>{% endif %}'
)


def make_tiny_flux2(folder, dev=True, distilled=False, seed=0):
    """Save a random ``Flux2Pipeline`` or ``Flux2KleinPipeline`` to ``folder`` and return the folder
    as a string.

    Its transformer takes latents ``(16, h, w)``, four pixels each (128 and 16 in the published
    models), and prompt embeddings ``(L, 24)``.

    Args:
        folder (Path or str): Made if it is missing.
        dev (bool): With guidance as an input; else as klein.
        distilled (bool): Of klein, whether its pipeline ignores guidance.
        seed (int): Of the weights; the tokenizers are always the same.
    """
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(**CONFIG, guidance_embeds=dev)
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            down_block_types=('DownEncoderBlock2D',) * 2,
            up_block_types=('UpDecoderBlock2D',) * 2,
        ).eval()
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        text_encoder = _mistral() if dev else _qwen()
    parts = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=_processor() if dev else _qwen_tokenizer(),
    )
    pipeline = (
        Flux2Pipeline(**parts) if dev else Flux2KleinPipeline(**parts, is_distilled=distilled)
    )
    pipeline.save_pretrained(os.fspath(folder))
    return os.fspath(folder)


def _vocab():
    """Byte-level BPE without merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}


def _sizes(layers):
    return dict(
        vocab_size=len(_vocab()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        initializer_range=0.3,
    )


def _qwen():
    """As many layers as the pipeline looks into."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_sizes(27)))


def _mistral():
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    vision = PixtralVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = MistralConfig(**_sizes(30))
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_index=3)
    return Mistral3ForConditionalGeneration(config)


def _qwen_tokenizer():
    from transformers import Qwen2TokenizerFast

    return Qwen2TokenizerFast(vocab=_vocab(), merges=[], chat_template=TEMPLATE)


def _processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=_vocab(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    return PixtralProcessor(PixtralImageProcessor(), fast, chat_template=TEMPLATE)
