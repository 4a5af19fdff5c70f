"""What several tiny targets share: sizes of towers, positions, special tokens, processors."""

from collections.abc import Callable
from typing import Any

import transformers as hf

from tiny_targets import FRAME_SIZE, HIDDEN_SIZE, PATCH_SIZE

# Half a head has four frequencies (hidden size 32, 4 heads): two for time, one each for height and width.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SQUARE = {"height": FRAME_SIZE, "width": FRAME_SIZE}
SHORTEST_EDGE = {"size": {"shortest_edge": FRAME_SIZE}, "crop_size": SQUARE}
LONGEST_EDGE = {"size": {"longest_edge": FRAME_SIZE}, "max_image_size": {"longest_edge": FRAME_SIZE}}
PIXELS = {"shortest_edge": FRAME_SIZE**2, "longest_edge": FRAME_SIZE**2}
#: Some processors bound the pixels of the whole video rather than those of a frame.
VIDEO_PIXELS = {"shortest_edge": FRAME_SIZE**2, "longest_edge": 1024 * FRAME_SIZE**2}
#: High-resolution tilings (LLaVA): two frames side by side or stacked.
PINPOINTS = [[FRAME_SIZE, 2 * FRAME_SIZE], [2 * FRAME_SIZE, FRAME_SIZE]]

VISION_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH_SIZE,
}
QWEN_VISION_SIZES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": HIDDEN_SIZE,
    "num_heads": 2,
    "patch_size": PATCH_SIZE,
}

HEAD_SIZE = HIDDEN_SIZE // 4
MERGED_PATCHES = {"patch_size": PATCH_SIZE, "merge_size": 2}
VIDEO_PATCHES = MERGED_PATCHES | {"temporal_patch_size": 2}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
INTERLEAVED_MROPE = MROPE | {"mrope_interleaved": True}
#: Keys and values of different widths, through low ranks.
LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    **EXPERTS,
}
QWEN3_VISION_SIZES = QWEN_VISION_SIZES | {"num_position_embeddings": (FRAME_SIZE // PATCH_SIZE) ** 2}
QWEN3_TEXT = {"head_dim": HEAD_SIZE, "rope_parameters": INTERLEAVED_MROPE}

PLACEHOLDERS = ("image_token", "video_token")
PAD_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_TOKENS = PAD_TOKENS | {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
LLAVA_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
QWEN_PROMPTS = {
    "video_prompt": "<|vision_start|><|video_pad|><|vision_end|>",
    "image_prompt": "<|vision_start|><|image_pad|><|vision_end|>",
}
LLAVA_PROMPTS = {"video_prompt": "<video>\n", "image_prompt": "<image>\n"}


def qwen_ids(tokens: dict[str, int]) -> dict[str, int]:
    return {f"{name}_id": token_id for name, token_id in tokens.items()}


def llava_ids(tokens: dict[str, int]) -> dict[str, int]:
    return {f"{name}_index": token_id for name, token_id in tokens.items()}


def qwen_processor(
    processor_class: type[hf.ProcessorMixin], video_processor_class: type, video_size: dict[str, int]
) -> Callable[[hf.PreTrainedTokenizerFast], hf.ProcessorMixin]:
    return lambda tokenizer: processor_class(
        image_processor=hf.Qwen2VLImageProcessor(**VIDEO_PATCHES, size=PIXELS),
        tokenizer=tokenizer,
        video_processor=video_processor_class(**VIDEO_PATCHES, size=video_size, cap_pixels_per_frame=False),
    )


def processor_of(
    processor_class: type[hf.ProcessorMixin], image_processor: Any, video_processor: Any, **further: Any
) -> Callable[[hf.PreTrainedTokenizerFast], hf.ProcessorMixin]:
    return lambda tokenizer: processor_class(
        image_processor=image_processor, tokenizer=tokenizer, video_processor=video_processor, **further
    )


QWEN3_REST: dict[str, Any] = {
    "processor": qwen_processor(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, VIDEO_PIXELS),
    "named_tokens": QWEN_TOKENS,
    "placeholder_tokens": PLACEHOLDERS,
    **QWEN_PROMPTS,
}
