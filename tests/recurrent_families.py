"""Video LLMs with recurrent layers (Qwen3.5), as tiny targets: dense, and with mixtures of experts."""

from typing import Any

import transformers as hf
from family_parts import (
    MROPE,
    PLACEHOLDERS,
    QWEN_PROMPTS,
    QWEN_TOKENS,
    QWEN_VISION_SIZES,
    VIDEO_PIXELS,
    qwen_ids,
    qwen_processor,
)

from tiny_targets import FRAME_SIZE, PATCH_SIZE, Family

_TEXT: dict[str, Any] = {
    "head_dim": 8,
    "rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_REST: dict[str, Any] = {
    "processor": qwen_processor(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, VIDEO_PIXELS),
    "named_tokens": QWEN_TOKENS,
    "placeholder_tokens": PLACEHOLDERS,
    **QWEN_PROMPTS,
}
_VISION = QWEN_VISION_SIZES | {"num_position_embeddings": (FRAME_SIZE // PATCH_SIZE) ** 2}

RECURRENT_FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen3_5",
        model_class=hf.Qwen3_5ForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen3_5Config(
            text_config=_TEXT | text, vision_config=_VISION, **qwen_ids(tokens)
        ),
        **_REST,
        chains_only="linear_attention",
    ),
    Family(
        name="qwen3_5_moe",
        model_class=hf.Qwen3_5MoeForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen3_5MoeConfig(
            text_config={
                name: value for name, value in (_TEXT | _EXPERTS | text).items() if name != "intermediate_size"
            },
            vision_config=_VISION,
            **qwen_ids(tokens),
        ),
        **_REST,
        chains_only="linear_attention",
    ),
)
