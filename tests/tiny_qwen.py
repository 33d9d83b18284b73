# Copyright (c) mmfgm authors.
"""What the tiny pipelines share whose text encoders are Qwens: a tokenizer of single bytes."""

from functools import cache

TEMPLATE = (
    '{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n'
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')


@cache
def vocabulary():
    """Byte-level BPE without merges: a token for each byte, and the special ones."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer():
    """A ``Qwen2Tokenizer`` with a chat template."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary(), merges=[], pad_token=SPECIAL[0], extra_special_tokens=[*SPECIAL[1:]]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def vary(module, std=0.05):
    """Move all weights away from their initial values, of which some are 0 and hide mistakes."""
    import torch

    for p in module.parameters():
        p.data = p.data + std * torch.randn_like(p)
    return module.eval()
