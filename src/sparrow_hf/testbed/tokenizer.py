"""The tokenizer and the chat template of the testbed's targets: one token per word of the world."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .captions import vocabulary

VOCABULARY_SIZE = 384
"""Rounded up, as real checkpoints do: the last ids belong to no token."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
UNKNOWN_TOKEN = "<|unknown|>"
ROLES = ("system", "user", "assistant")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the world; other words are spelled letter by letter."""
    words = sorted({*vocabulary(), *ROLES, *LETTERS, *(f"##{letter}" for letter in LETTERS)})
    tokens = [*SPECIAL_TOKENS, UNKNOWN_TOKEN, *words]
    if len(tokens) > VOCABULARY_SIZE:
        raise ValueError(f"The world has {len(tokens)} tokens, more than VOCABULARY_SIZE={VOCABULARY_SIZE}.")
    tokenizer = Tokenizer(
        models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN_TOKEN)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=UNKNOWN_TOKEN,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
    )
