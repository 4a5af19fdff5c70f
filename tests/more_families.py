"""Families whose layers all attend to the whole text, beyond the nine of `families.py`."""

from typing import Any

import transformers as hf
from family_parts import (
    EXPERTS,
    HEAD_SIZE,
    LATENT_ATTENTION,
    MERGED_PATCHES,
    MROPE,
    PIXELS,
    PLACEHOLDERS,
    QWEN3_REST,
    QWEN3_TEXT,
    QWEN3_VISION_SIZES,
    QWEN_PROMPTS,
    QWEN_TOKENS,
    QWEN_VISION_SIZES,
    SQUARE,
    VIDEO_PATCHES,
    VIDEO_PIXELS,
    VISION_SIZES,
    processor_of,
    qwen_ids,
    qwen_processor,
)
from transformers.utils import is_timm_available

from tiny_targets import FRAME_SIZE, HIDDEN_SIZE, PATCH_SIZE, Family

# -- Qwen3-VL and its kin ---------------------------------------------------------------------------------------------

_DEEPSTACK = QWEN3_VISION_SIZES | {"deepstack_visual_indexes": [0, 1]}

_QWEN3_KIN = (
    Family(
        name="qwen3_vl_moe",
        model_class=hf.Qwen3VLMoeForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen3VLMoeConfig(
            text_config=text | QWEN3_TEXT | EXPERTS | {"num_local_experts": 4, "tie_word_embeddings": False},
            vision_config=_DEEPSTACK,
            **qwen_ids(tokens),
        ),
        **QWEN3_REST,
    ),
    Family(
        name="cosmos3_omni",
        model_class=hf.Cosmos3OmniForConditionalGeneration,
        config=lambda text, tokens: hf.Cosmos3OmniConfig(
            text_config=text | QWEN3_TEXT, vision_config=_DEEPSTACK, **qwen_ids(tokens)
        ),
        **QWEN3_REST,
    ),
    Family(
        name="cosmos3_edge",
        model_class=hf.Cosmos3EdgeForConditionalGeneration,
        config=lambda text, tokens: hf.Cosmos3EdgeConfig(
            text_config=text | QWEN3_TEXT,
            vision_config=VISION_SIZES | {"num_patches": 16},
            projector_hidden_size=64,
            **qwen_ids(tokens),
        ),
        processor=processor_of(
            hf.Cosmos3EdgeProcessor,
            hf.Cosmos3EdgeImageProcessor(**MERGED_PATCHES),
            hf.Cosmos3EdgeVideoProcessor(**MERGED_PATCHES, temporal_patch_size=1, size=VIDEO_PIXELS),
        ),
        named_tokens=QWEN_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="<|video_pad|>",
        image_prompt="<|image_pad|>",
        videos_kwargs={"return_metadata": True, "return_mm_token_type_ids": True},
    ),
    Family(
        # Tower of Qwen2.5-VL. Its forward is prepared without positions: the model counts them itself.
        name="hyperclovax_vision_v2",
        model_class=hf.HyperCLOVAXVisionV2ForConditionalGeneration,
        config=lambda text, tokens: hf.HyperCLOVAXVisionV2Config(
            text_config=text
            | {"model_type": "hyperclovax", "head_dim": HEAD_SIZE, "attention_multiplier": HEAD_SIZE**-0.5},
            vision_config=QWEN_VISION_SIZES | {"window_size": 2 * PATCH_SIZE, "fullatt_block_indexes": [1]},
            image_token_id=tokens["image_token"],
            video_token_id=tokens["video_token"],
        ),
        processor=qwen_processor(hf.HyperCLOVAXVisionV2Processor, hf.Qwen2VLVideoProcessor, PIXELS),
        named_tokens=QWEN_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        **QWEN_PROMPTS,
    ),
)

# -- GLM --------------------------------------------------------------------------------------------------------------

_GLM_VISION_SIZES = QWEN_VISION_SIZES | {"image_size": FRAME_SIZE}
_GLM_REST: dict[str, Any] = {
    "named_tokens": {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    },
    "placeholder_tokens": PLACEHOLDERS,
    "video_prompt": "<|begin_of_video|><|video|><|end_of_video|>",
    "image_prompt": "<|begin_of_image|><|image|><|end_of_image|>",
}


def _glm_processor(kind: str) -> Any:
    processor, image, video = (
        getattr(hf, f"{kind}{part}") for part in ("Processor", "ImageProcessor", "VideoProcessor")
    )
    return processor_of(processor, image(**VIDEO_PATCHES, size=PIXELS), video(**VIDEO_PATCHES, size=VIDEO_PIXELS))


def _glm_moe(name: str, partial_rotary_factor: float) -> Family:
    # Half a head rotates: with two frequencies, one is for time and one for the height.
    sections = [2, 1, 1] if partial_rotary_factor == 1.0 else [1, 1, 0]
    rope = MROPE | {"partial_rotary_factor": partial_rotary_factor, "mrope_section": sections}
    return Family(
        name=name,
        model_class=hf.Glm4vMoeForConditionalGeneration,
        config=lambda text, tokens: hf.Glm4vMoeConfig(
            text_config=text | EXPERTS | {"rope_parameters": rope, "n_routed_experts": 4},
            vision_config=_GLM_VISION_SIZES,
            **qwen_ids(tokens),
        ),
        processor=_glm_processor("Glm4v"),
        **_GLM_REST,
    )


_GLM = (
    Family(
        name="glm4v",
        model_class=hf.Glm4vForConditionalGeneration,
        config=lambda text, tokens: hf.Glm4vConfig(
            text_config=text | {"rope_parameters": MROPE}, vision_config=_GLM_VISION_SIZES, **qwen_ids(tokens)
        ),
        processor=_glm_processor("Glm4v"),
        **_GLM_REST,
    ),
    Family(
        name="glm46v",
        model_class=hf.Glm46VForConditionalGeneration,
        config=lambda text, tokens: hf.Glm46VConfig(
            text_config=text | {"rope_parameters": MROPE}, vision_config=_GLM_VISION_SIZES, **qwen_ids(tokens)
        ),
        processor=_glm_processor("Glm46V"),
        **_GLM_REST,
    ),
    _glm_moe("glm4v_moe", 1.0),
    _glm_moe("glm4v_moe-half-rotary", 0.5),
)

# -- the thinkers of Qwen's omni models -------------------------------------------------------------------------------

_AUDIO_SIZES = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": HIDDEN_SIZE,
    "max_source_positions": 100,
    "n_window": 10,
}


def _omni_processor(kind: type[hf.ProcessorMixin]) -> Any:
    # The class has a size of its own, which would win over the video processor's.
    kind = type(kind.__name__, (kind,), {"videos_kwargs": {"size": PIXELS, "cap_pixels_per_frame": False}})
    return lambda tokenizer: kind(
        image_processor=hf.Qwen2VLImageProcessor(**VIDEO_PATCHES, size=PIXELS),
        video_processor=hf.Qwen2VLVideoProcessor(**VIDEO_PATCHES, size=PIXELS, cap_pixels_per_frame=False),
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=16),
        tokenizer=tokenizer,
    )


def _omni_ids(tokens: dict[str, int], suffix: str) -> dict[str, int]:
    return {f"{kind}_token_{suffix}": tokens[f"{kind}_token"] for kind in ("image", "video", "audio")} | {
        "audio_start_token_id": tokens["audio_bos_token"],
        "vision_start_token_id": tokens["vision_bos_token"],
        "vision_end_token_id": tokens["vision_eos_token"],
    }


_OMNI_REST: dict[str, Any] = {
    "named_tokens": {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    },
    "placeholder_tokens": PLACEHOLDERS,
    "video_prompt": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "image_prompt": "<|vision_bos|><|IMAGE|><|vision_eos|>",
}
_OMNI = (
    Family(
        name="qwen2_5_omni_thinker",
        model_class=hf.Qwen2_5OmniThinkerForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen2_5OmniThinkerConfig(
            text_config=text | {"rope_parameters": MROPE, "tie_word_embeddings": False},
            vision_config=QWEN_VISION_SIZES | {"window_size": 2 * PATCH_SIZE, "fullatt_block_indexes": [1]},
            audio_config=_AUDIO_SIZES,
            **_omni_ids(tokens, "index"),
        ),
        processor=_omni_processor(hf.Qwen2_5OmniProcessor),
        **_OMNI_REST,
    ),
    Family(
        name="qwen3_omni_moe_thinker",
        model_class=hf.Qwen3OmniMoeThinkerForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen3OmniMoeThinkerConfig(
            text_config=text | QWEN3_TEXT | EXPERTS | {"num_experts": 4, "tie_word_embeddings": False},
            vision_config=_DEEPSTACK,
            audio_config=_AUDIO_SIZES | {"downsample_hidden_size": 8, "n_window_infer": 20},
            **_omni_ids(tokens, "id"),
        ),
        processor=_omni_processor(hf.Qwen3OmniMoeProcessor),
        **_OMNI_REST,
    ),
)

# -- one of a kind ----------------------------------------------------------------------------------------------------

_OTHERS = (
    Family(
        name="ernie4_5_vl_moe",
        model_class=hf.Ernie4_5_VLMoeForConditionalGeneration,
        config=lambda text, tokens: hf.Ernie4_5_VLMoeConfig(
            text_config=text
            | {
                "rope_parameters": MROPE | {"mrope_section": [1, 1, 2]},
                # Experts for text and for visual tokens.
                "moe_intermediate_size": [16, 8],
                "moe_k": 2,
                "moe_num_experts": 4,
                "moe_num_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "tie_word_embeddings": False,
            },
            vision_config={name: value for name, value in QWEN_VISION_SIZES.items() if name != "out_hidden_size"}
            | {"temporal_merge_size": 2},
            tie_word_embeddings=False,
            **qwen_ids(tokens),
        ),
        processor=processor_of(
            hf.Ernie4_5_VLMoeProcessor,
            hf.Ernie4_5_VLMoeImageProcessor(**MERGED_PATCHES, size=PIXELS),
            hf.Ernie4_5_VLMoeVideoProcessor(**VIDEO_PATCHES, size=PIXELS, draw_on_frames=False),
        ),
        named_tokens={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>",
        image_prompt="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
    ),
    Family(
        name="molmo2",
        model_class=hf.Molmo2ForConditionalGeneration,
        config=lambda text, tokens: hf.Molmo2Config(
            text_config=text | {"head_dim": HEAD_SIZE, "additional_vocab_size": 0},
            vision_config=VISION_SIZES
            | {
                "num_key_value_heads": 2,
                "head_dim": 8,
                "image_size": [FRAME_SIZE, FRAME_SIZE],
                "num_position_embeddings": 16,
            },
            adapter_config={
                "vision_feature_layer": [1, 0],
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 32,
                "text_hidden_size": HIDDEN_SIZE,
            },
            image_patch_id=tokens["image_patch"],
            image_start_token_id=tokens["image_start"],
            image_end_token_id=tokens["image_end"],
            low_res_image_start_token_id=tokens["low_res_image_start"],
            frame_start_token_id=tokens["frame_start"],
            frame_end_token_id=tokens["frame_end"],
        ),
        processor=processor_of(
            hf.Molmo2Processor,
            hf.Molmo2ImageProcessor(size=SQUARE, patch_size=PATCH_SIZE),
            hf.Molmo2VideoProcessor(size=SQUARE, patch_size=PATCH_SIZE, pooling_size=[2, 2]),
        ),
        named_tokens={
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "image_patch": "<im_patch>",
            "image_column": "<im_col>",
            "image_start": "<im_start>",
            "low_res_image_start": "<low_res_im_start>",
            "frame_start": "<frame_start>",
            "image_end": "<im_end>",
            "frame_end": "<frame_end>",
            "low_res_image": "<im_low>",
        },
        placeholder_tokens=("image_patch",),
        video_prompt="<|video|>\n",
        image_prompt="<|image|>\n",
        max_videos=1,
    ),
)

#: transformers 5.23 reads only the first two frames of a video.
_SINCE_5_24 = (
    Family(
        name="kimi_k25",
        model_class=hf.Kimi_K25ForConditionalGeneration,
        config=lambda text, tokens: hf.Kimi_K25Config(
            text_config=text
            | LATENT_ATTENTION
            | {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "tie_word_embeddings": False},
            vision_config=VISION_SIZES | {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 4},
            projection_hidden_size=16,
            tie_word_embeddings=False,
            **qwen_ids(tokens),
        ),
        processor=processor_of(
            hf.Kimi_K25Processor,
            hf.Kimi_K25ImageProcessor(**MERGED_PATCHES),
            hf.Kimi_K25VideoProcessor(**VIDEO_PATCHES, size={"max_height": FRAME_SIZE, "max_width": FRAME_SIZE}),
        ),
        named_tokens={
            "image_token": "<|media_pad|>",
            "video_token": "<|kimi_k25_video_placeholder|>",
            "vision_start_token": "<|media_begin|>",
            "vision_end_token": "<|media_end|>",
            "media_content": "<|media_content|>",
        },
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="<|kimi_k25_video_placeholder|>\n",
        image_prompt="<|media_pad|>\n",
    ),
)

#: Its tower is one of timm's.
_WITH_TIMM = (
    Family(
        name="perception_lm",
        model_class=hf.PerceptionLMForConditionalGeneration,
        config=lambda text, tokens: hf.PerceptionLMConfig(
            text_config=text | {"model_type": "llama"},
            vision_config={
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    "embed_dim": 16,
                    "img_size": (FRAME_SIZE, FRAME_SIZE),
                    "patch_size": PATCH_SIZE,
                    "depth": 2,
                    "num_heads": 2,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": (FRAME_SIZE // PATCH_SIZE, FRAME_SIZE // PATCH_SIZE),
                },
            },
            projector_pooling_ratio=2,
            image_token_id=tokens["image_token"],
            video_token_id=tokens["video_token"],
        ),
        processor=processor_of(
            hf.PerceptionLMProcessor,
            hf.PerceptionLMImageProcessor(tile_size=FRAME_SIZE, max_num_tiles=2),
            hf.PerceptionLMVideoProcessor(size=SQUARE),
            patch_size=PATCH_SIZE,
            pooling_ratio=2,
        ),
        named_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="<|video|>\n",
        image_prompt="<|image|>\n",
        takes_chunks=False,
    ),
)

MORE_FAMILIES: tuple[Family, ...] = (
    *_QWEN3_KIN,
    *_GLM,
    *_OMNI,
    *_OTHERS,
    *(_WITH_TIMM if is_timm_available() else ()),
)
if not hf.__version__.startswith("5.23."):
    MORE_FAMILIES += _SINCE_5_24
