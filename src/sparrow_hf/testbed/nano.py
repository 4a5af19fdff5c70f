"""The testbed's target: a deep and narrow Qwen2.5-VL of the real classes, its processor, and how well it sees.

Both load with plain `from_pretrained` from a folder in standard layout; the trained ones ship in `assets/target`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from ..video import prepare_inputs
from .captions import content_score, vocabulary
from .world import FRAME_SIZE, FRAMES_PER_STEP, make_clip

ASSETS = Path(__file__).parent / "assets"
PATCH_SIZE = 16
MERGE_SIZE = 2
VOCABULARY_SIZE = 384
"""Rounded up, as real checkpoints do: the last ids belong to no token."""
MAX_CAPTION_TOKENS = 256
"""More than any caption of the world has."""

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


def build_processor() -> Qwen2_5_VLProcessor:
    """The target's processor, made of the classes that Qwen2.5-VL itself uses.

    Frames of any size are brought to about 64 × 64 pixels, which makes 4 visual tokens of every two frames, and no
    frame is ever left out.
    """
    pixels = {"shortest_edge": FRAME_SIZE**2, "longest_edge": FRAME_SIZE**2}
    patches: dict[str, Any] = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": FRAMES_PER_STEP,
        "merge_size": MERGE_SIZE,
        "size": pixels,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=Qwen2VLVideoProcessor(
            **patches, max_frames=1_000_000, do_sample_frames=False, cap_pixels_per_frame=False
        ),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def target_config(tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int = 24) -> Qwen2_5_VLConfig:
    """The target's configuration: `num_hidden_layers` decoder layers × 96 with one KV head, vision 2 × 96."""
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 65_536,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4]},
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": FRAMES_PER_STEP,
            "window_size": 2 * FRAME_SIZE,
            "fullatt_block_indexes": [0, 1],
            "tokens_per_second": 4,
            "out_hidden_size": 96,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
        dtype="float32",
    )


@torch.no_grad()
def build_target(
    tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int = 24, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained target in fp32 evaluation mode, its weights drawn from `seed`.

    Linear layers keep the variance of their input, and the two that write into the residual stream are scaled down
    with depth: transformers' constant 0.02 is made for models ten times as wide and learns nothing here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = Qwen2_5_VLForConditionalGeneration(target_config(tokenizer, num_hidden_layers))
        for name, parameter in target.named_parameters():
            if parameter.ndim < 2:
                continue
            deviation = 1 / math.sqrt(parameter[0].numel())
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation /= math.sqrt(2 * num_hidden_layers)
            elif name.endswith("embed_tokens.weight"):
                deviation = 0.5
            parameter.normal_(std=deviation)
    target.generation_config = GenerationConfig(
        eos_token_id=target.config.text_config.eos_token_id,
        pad_token_id=target.config.text_config.pad_token_id,
        do_sample=False,
    )
    return target.eval()


def load_target(
    folder: str | PathLike[str] | None = None,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Loads the target and its processor, in fp32 evaluation mode, from `folder` or from the package's own weights."""
    folder = ASSETS / "target" if folder is None else Path(folder)
    target = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return target.eval(), AutoProcessor.from_pretrained(folder)


def num_visual_tokens(target: Qwen2_5_VLForConditionalGeneration, input_ids: torch.Tensor) -> int:
    """How many rows of a prompt are visual."""
    return int((input_ids == target.config.video_token_id).sum() + (input_ids == target.config.image_token_id).sum())


@torch.no_grad()
def content_accuracy(
    target: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    seeds: Iterable[int] | Sequence[int],
    visual_tokens: int,
) -> float:
    """Share of what clips show (entities, colours, motions, places, order) that greedy captions get right.

    Every seed's clip is written as an mp4, read back and captioned freely with plain `generate()`. Claims that are
    missing, wrong or invented all count against the caption.
    """
    right = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            clip = make_clip(Path(folder) / "clip.mp4", seed, visual_tokens)
            inputs = prepare_inputs(processor, clip.messages)
            output = target.generate(**inputs, max_new_tokens=MAX_CAPTION_TOKENS)
            caption = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            agreed, claimed = content_score(caption, clip.caption)
            right, total = right + agreed, total + claimed
    return right / total
