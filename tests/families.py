"""The nine supported architectures, as tiny targets.

Everything a family needs is one entry of `FAMILIES`: its configuration, its processor, and what a prompt holds where a
video goes. No other test code depends on the family.
"""

from collections.abc import Callable
from typing import Any

import transformers as hf

from tiny_targets import FRAME_SIZE, HIDDEN_SIZE, PATCH_SIZE, Family

# Half a head has four frequencies (hidden size 32, 4 heads): two for time, one each for height and width.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SQUARE = {"height": FRAME_SIZE, "width": FRAME_SIZE}
_SHORTEST_EDGE = {"size": {"shortest_edge": FRAME_SIZE}, "crop_size": _SQUARE}
_LONGEST_EDGE = {"size": {"longest_edge": FRAME_SIZE}, "max_image_size": {"longest_edge": FRAME_SIZE}}
_PIXELS = {"shortest_edge": FRAME_SIZE**2, "longest_edge": FRAME_SIZE**2}
#: Some processors bound the pixels of the whole video rather than those of a frame.
_VIDEO_PIXELS = {"shortest_edge": FRAME_SIZE**2, "longest_edge": 1024 * FRAME_SIZE**2}
#: High-resolution tilings (LLaVA): two frames side by side or stacked.
_PINPOINTS = [[FRAME_SIZE, 2 * FRAME_SIZE], [2 * FRAME_SIZE, FRAME_SIZE]]

_VISION_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH_SIZE,
}
_QWEN_VISION_SIZES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": HIDDEN_SIZE,
    "num_heads": 2,
    "patch_size": PATCH_SIZE,
}

_PLACEHOLDERS = ("image_token", "video_token")
_PAD_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_QWEN_TOKENS = _PAD_TOKENS | {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
_LLAVA_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
_QWEN_PROMPTS = {
    "video_prompt": "<|vision_start|><|video_pad|><|vision_end|>",
    "image_prompt": "<|vision_start|><|image_pad|><|vision_end|>",
}
_LLAVA_PROMPTS = {"video_prompt": "<video>\n", "image_prompt": "<image>\n"}


def _qwen_ids(tokens: dict[str, int]) -> dict[str, int]:
    return {f"{name}_id": token_id for name, token_id in tokens.items()}


def _llava_ids(tokens: dict[str, int]) -> dict[str, int]:
    return {f"{name}_index": token_id for name, token_id in tokens.items()}


def _qwen_processor(
    processor_class: type[hf.ProcessorMixin], video_processor_class: type, video_size: dict[str, int]
) -> Callable[[hf.PreTrainedTokenizerFast], hf.ProcessorMixin]:
    patches = {"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "merge_size": 2}
    return lambda tokenizer: processor_class(
        image_processor=hf.Qwen2VLImageProcessor(**patches, size=_PIXELS),
        tokenizer=tokenizer,
        video_processor=video_processor_class(**patches, size=video_size, cap_pixels_per_frame=False),
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen2_5_vl",
        model_class=hf.Qwen2_5_VLForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": _MROPE},
            # Windows of one merged patch, full attention in the last block: both kinds of block run.
            vision_config=_QWEN_VISION_SIZES
            | {"window_size": 2 * PATCH_SIZE, "fullatt_block_indexes": [1], "tokens_per_second": 2},
            **_qwen_ids(tokens),
        ),
        processor=_qwen_processor(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor, _PIXELS),
        named_tokens=_QWEN_TOKENS,
        placeholder_tokens=_PLACEHOLDERS,
        **_QWEN_PROMPTS,
    ),
    Family(
        name="llava_onevision",
        model_class=hf.LlavaOnevisionForConditionalGeneration,
        config=lambda text, tokens: hf.LlavaOnevisionConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=_VISION_SIZES
            | {"model_type": "siglip_vision_model", "image_size": FRAME_SIZE, "vision_use_head": False},
            image_grid_pinpoints=_PINPOINTS,
            **_llava_ids(tokens),
        ),
        processor=lambda tokenizer: hf.LlavaOnevisionProcessor(
            image_processor=hf.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=_PINPOINTS),
            tokenizer=tokenizer,
            video_processor=hf.LlavaOnevisionVideoProcessor(size=_SQUARE),
            num_image_tokens=(FRAME_SIZE // PATCH_SIZE) ** 2,
            vision_feature_select_strategy="full",
        ),
        named_tokens=_LLAVA_TOKENS,
        placeholder_tokens=_PLACEHOLDERS,
        **_LLAVA_PROMPTS,
    ),
    Family(
        name="internvl",
        model_class=hf.InternVLForConditionalGeneration,
        config=lambda text, tokens: hf.InternVLConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=_VISION_SIZES | {"image_size": FRAME_SIZE},
            image_token_id=tokens["context_image_token"],
            image_seq_length=4,
            # The smallest InternVL models share embedding and head; one family here must do so too.
            tie_word_embeddings=True,
        ),
        processor=lambda tokenizer: hf.InternVLProcessor(
            image_processor=hf.GotOcr2ImageProcessor(size=_SQUARE, crop_to_patches=True, max_patches=2),
            tokenizer=tokenizer,
            video_processor=hf.InternVLVideoProcessor(size=_SQUARE),
            image_seq_length=4,
        ),
        named_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        placeholder_tokens=("context_image_token",),
        video_prompt="<video>\n",
        image_prompt="<IMG_CONTEXT>\n",
    ),
    Family(
        name="qwen2_vl",
        model_class=hf.Qwen2VLForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen2VLConfig(
            text_config=text | {"rope_parameters": _MROPE},
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": HIDDEN_SIZE,
                "num_heads": 2,
                "patch_size": PATCH_SIZE,
            },
            **_qwen_ids(tokens),
        ),
        processor=_qwen_processor(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, _PIXELS),
        named_tokens=_QWEN_TOKENS,
        placeholder_tokens=_PLACEHOLDERS,
        **_QWEN_PROMPTS,
    ),
    Family(
        name="qwen3_vl",
        model_class=hf.Qwen3VLForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen3VLConfig(
            text_config=text
            | {
                "head_dim": HIDDEN_SIZE // text["num_attention_heads"],
                "rope_parameters": _MROPE | {"mrope_interleaved": True},
            },
            vision_config=_QWEN_VISION_SIZES
            | {
                "num_position_embeddings": (FRAME_SIZE // PATCH_SIZE) ** 2,
                # Deepstack: features of both blocks are added inside the decoder.
                "deepstack_visual_indexes": [0, 1],
            },
            **_qwen_ids(tokens),
        ),
        processor=_qwen_processor(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, _VIDEO_PIXELS),
        named_tokens=_QWEN_TOKENS,
        placeholder_tokens=_PLACEHOLDERS,
        **_QWEN_PROMPTS,
    ),
    Family(
        name="llava_next_video",
        model_class=hf.LlavaNextVideoForConditionalGeneration,
        config=lambda text, tokens: hf.LlavaNextVideoConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=_VISION_SIZES | {"model_type": "clip_vision_model", "image_size": FRAME_SIZE},
            image_grid_pinpoints=_PINPOINTS,
            **_llava_ids(tokens),
        ),
        processor=lambda tokenizer: hf.LlavaNextVideoProcessor(
            image_processor=hf.LlavaNextImageProcessor(**_SHORTEST_EDGE, image_grid_pinpoints=_PINPOINTS),
            tokenizer=tokenizer,
            video_processor=hf.LlavaNextVideoVideoProcessor(**_SHORTEST_EDGE),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        named_tokens=_LLAVA_TOKENS,
        placeholder_tokens=_PLACEHOLDERS,
        **_LLAVA_PROMPTS,
    ),
    Family(
        name="video_llava",
        model_class=hf.VideoLlavaForConditionalGeneration,
        config=lambda text, tokens: hf.VideoLlavaConfig(
            text_config=text | {"model_type": "llama"},
            # No pooling follows this tower, so its patches are larger: 4 and a class token per frame.
            vision_config=_VISION_SIZES
            | {"model_type": "clip_vision_model", "image_size": FRAME_SIZE, "patch_size": FRAME_SIZE // 2},
            **_llava_ids(tokens),
        ),
        processor=lambda tokenizer: hf.VideoLlavaProcessor(
            image_processor=hf.VideoLlavaImageProcessor(**_SHORTEST_EDGE),
            tokenizer=tokenizer,
            video_processor=hf.VideoLlavaVideoProcessor(**_SHORTEST_EDGE),
            patch_size=FRAME_SIZE // 2,
        ),
        named_tokens=_LLAVA_TOKENS,
        placeholder_tokens=_PLACEHOLDERS,
        **_LLAVA_PROMPTS,
    ),
    Family(
        name="smolvlm",
        model_class=hf.SmolVLMForConditionalGeneration,
        config=lambda text, tokens: hf.SmolVLMConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=_VISION_SIZES | {"image_size": FRAME_SIZE},
            image_token_id=tokens["image_token"],
            scale_factor=2,
            pad_token_id=text["pad_token_id"],
        ),
        processor=lambda tokenizer: hf.SmolVLMProcessor(
            image_processor=hf.SmolVLMImageProcessor(**_LONGEST_EDGE, do_image_splitting=False),
            tokenizer=tokenizer,
            video_processor=hf.SmolVLMVideoProcessor(**_LONGEST_EDGE),
            image_seq_len=4,
        ),
        named_tokens=_LLAVA_TOKENS
        | {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
        placeholder_tokens=("image_token",),
        video_prompt="<video>",
        image_prompt="<image>",
        # Its processor writes images and videos under one key.
        mixes_modalities=False,
    ),
    Family(
        name="video_llama_3",
        model_class=hf.VideoLlama3ForConditionalGeneration,
        config=lambda text, tokens: hf.VideoLlama3Config(
            text_config=text | {"model_type": "qwen2"}, vision_config=_VISION_SIZES, **_qwen_ids(tokens)
        ),
        processor=lambda tokenizer: hf.VideoLlama3Processor(
            image_processor=hf.VideoLlama3ImageProcessor(patch_size=PATCH_SIZE, size=_PIXELS),
            tokenizer=tokenizer,
            video_processor=hf.VideoLlama3VideoProcessor(patch_size=PATCH_SIZE, size=_VIDEO_PIXELS),
        ),
        named_tokens=_PAD_TOKENS,
        placeholder_tokens=_PLACEHOLDERS,
        video_prompt="<|video_pad|>\n",
        image_prompt="<|image_pad|>\n",
    ),
)

#: The same, by `model_type`.
FAMILY_BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
