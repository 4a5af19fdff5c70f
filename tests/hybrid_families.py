"""Families that mix kinds of layers: full attention with windows, convolutions, recurrent states or selected keys."""

from typing import Any

import transformers as hf
from family_parts import (
    HEAD_SIZE,
    PLACEHOLDERS,
    QWEN_TOKENS,
    SQUARE,
    VIDEO_PATCHES,
    VIDEO_PIXELS,
    VISION_SIZES,
    processor_of,
    qwen_ids,
    qwen_processor,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tiny_targets import FRAME_SIZE, PATCH_SIZE, Family

#: Shorter than any prompt, so that every window is full.
WINDOW = 16
WINDOWS_AND_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER_EMBEDDINGS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160}

# -- windows ----------------------------------------------------------------------------------------------------------

_GEMMA_REST: dict[str, Any] = {
    "named_tokens": {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "audio_token": "<|audio|>",
        "boi_token": "<boi>",
        "eoi_token": "<eoi>",
        "boa_token": "<boa>",
        "eoa_token": "<eoa>",
    },
    "placeholder_tokens": PLACEHOLDERS,
    "video_prompt": "<|video|>\n",
    "image_prompt": "<|image|>\n",
}


def _gemma_ids(tokens: dict[str, int]) -> dict[str, int]:
    named = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "boa_token")
    return {f"{name}_id": tokens[name] for name in named} | {"eoa_token_index": tokens["eoa_token"]}


def gemma(name: str, **text_fields: Any) -> Family:
    """A Gemma 4 with these fields in its text decoder."""
    return Family(
        name=name,
        model_class=hf.Gemma4ForConditionalGeneration,
        config=lambda text, tokens: hf.Gemma4Config(
            text_config=text
            | {"head_dim": HEAD_SIZE, "per_layer_config": {}, "tie_word_embeddings": False}
            | {"hidden_size_per_layer_input": 0}
            | text_fields,
            vision_config=VISION_SIZES
            | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
            audio_config=None,
            tie_word_embeddings=False,
            **_gemma_ids(tokens),
        ),
        processor=lambda tokenizer: hf.Gemma4Processor(
            feature_extractor=hf.Gemma4AudioFeatureExtractor(),
            image_processor=hf.Gemma4ImageProcessor(patch_size=PATCH_SIZE, max_soft_tokens=70, pooling_kernel_size=2),
            tokenizer=tokenizer,
            video_processor=hf.Gemma4VideoProcessor(patch_size=PATCH_SIZE, max_soft_tokens=70, pooling_kernel_size=2),
        ),
        **_GEMMA_REST,
    )


_WINDOWED = (
    gemma("gemma4", **WINDOWS_AND_FULL),
    # Every layer also reads an embedding of its own of the token.
    gemma("gemma4-ple", **WINDOWS_AND_FULL, **PER_LAYER_EMBEDDINGS),
    # The last two layers read the keys and values of the first two.
    gemma("gemma4-shared", **WINDOWS_AND_FULL, **PER_LAYER_EMBEDDINGS, num_kv_shared_layers=2),
    gemma("gemma4-full", layer_types=["full_attention"] * 4),
    Family(
        name="gemma4_unified",
        model_class=hf.Gemma4UnifiedForConditionalGeneration,
        config=lambda text, tokens: hf.Gemma4UnifiedConfig(
            text_config=text
            | WINDOWS_AND_FULL
            | {"per_layer_config": {}, "head_dim": HEAD_SIZE, "tie_word_embeddings": False},
            vision_config={
                "patch_size": PATCH_SIZE,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 16,
                "mm_posemb_size": 64,
                "output_proj_dims": 16,
            },
            audio_config=None,
            tie_word_embeddings=False,
            **_gemma_ids(tokens),
        ),
        processor=lambda tokenizer: hf.Gemma4UnifiedProcessor(
            feature_extractor=hf.Gemma4UnifiedAudioFeatureExtractor(),
            image_processor=hf.Gemma4UnifiedImageProcessor(
                patch_size=PATCH_SIZE, max_soft_tokens=70, pooling_kernel_size=2
            ),
            tokenizer=tokenizer,
            video_processor=hf.Gemma4UnifiedVideoProcessor(
                patch_size=PATCH_SIZE, max_soft_tokens=70, pooling_kernel_size=2
            ),
        ),
        **_GEMMA_REST,
    ),
)

# -- layers that serve chains only ------------------------------------------------------------------------------------


def _minimax(name: str, layer_types: list[str], **expected: Any) -> Family:
    return Family(
        name=name,
        model_class=hf.MiniMaxM3SparseForConditionalGeneration,
        config=lambda text, tokens: hf.MiniMaxM3VLConfig(
            text_config=text
            | {
                "head_dim": HEAD_SIZE,
                "rotary_dim": 4,
                "num_experts_per_tok": 2,
                "num_local_experts": 4,
                "intermediate_size": 16,
                "dense_intermediate_size": 32,
                "shared_intermediate_size": 16,
                "layer_types": layer_types,
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "index_n_heads": 2,
                "index_head_dim": 8,
                "index_block_size": 4,
                "index_topk_blocks": 4,
            },
            vision_config=VISION_SIZES | {"image_size": FRAME_SIZE},
            projector_hidden_size=32,
            merged_hidden_size=128,
            image_token_index=tokens["image_token"],
            video_token_index=tokens["video_token"],
        ),
        processor=processor_of(
            hf.MiniMaxM3VLProcessor,
            hf.MiniMaxM3VLImageProcessor(**VIDEO_PATCHES),
            hf.MiniMaxM3VLVideoProcessor(**VIDEO_PATCHES, size=SQUARE),
        ),
        named_tokens={
            "image_token": "]<]image[>[",
            "video_token": "]<]video[>[",
            "vision_start_token": "]<]start of image[>[",
            "vision_end_token": "]<]end of image[>[",
        },
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="]<]video[>[\n",
        image_prompt="]<]image[>[\n",
        **expected,
    )


_CHAINS_ONLY = (
    _minimax("minimax_m3_vl", ["full_attention"] * 4),
    _minimax(
        "minimax_m3_vl-sparse",
        ["full_attention", "minimax_m3_sparse"] * 2,
        chains_only="minimax_m3_sparse",
        counts_padding=True,
    ),
    Family(
        name="lfm3_vl",
        model_class=hf.Lfm3VlForConditionalGeneration,
        config=lambda text, tokens: hf.Lfm3VlConfig(
            text_config=text
            | {
                "head_dim": HEAD_SIZE,
                "sliding_window": WINDOW,
                "layer_types": ["conv", "full_attention", "sliding_attention", "conv"],
                "conv_L_cache": 3,
                "tie_word_embeddings": False,
            },
            vision_config=VISION_SIZES | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            projector_hidden_size=32,
            tie_word_embeddings=False,
            **qwen_ids(tokens),
        ),
        processor=qwen_processor(hf.Lfm3VlProcessor, hf.Qwen3VLVideoProcessor, VIDEO_PIXELS),
        named_tokens=QWEN_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="<|video_pad|>",
        image_prompt="<|image_pad|>",
        chains_only="conv",
    ),
)

# -- chunks -----------------------------------------------------------------------------------------------------------

#: Shorter than the rows of a round, so that rounds cross one border of a chunk or two.
CHUNK = 6

# Llama 4 of transformers 5.24.0 reads this of its text model's outputs, which lack it: every forward fails.
MoeCausalLMOutputWithPast.image_outputs = getattr(MoeCausalLMOutputWithPast, "image_outputs", None)


def _llama4(name: str, chains_only: str, **text_fields: Any) -> Family:
    # The second layer has no rotary embedding. Its queries grow with the row they stand in, which it counts itself.
    return Family(
        name=name,
        model_class=hf.Llama4ForConditionalGeneration,
        config=lambda text, tokens: hf.Llama4Config(
            text_config=text
            | {
                "head_dim": HEAD_SIZE,
                "attention_chunk_size": CHUNK,
                "no_rope_layers": [1, 0, 1, 1],
                "floor_scale": CHUNK,
                "attn_scale": 0.5,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 64,
            }
            | text_fields,
            vision_config=VISION_SIZES
            | {
                "image_size": FRAME_SIZE,
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            image_token_index=tokens["patch_token"],
        ),
        processor=lambda tokenizer: hf.Llama4Processor(
            image_processor=hf.Llama4ImageProcessor(size=SQUARE, max_patches=1),
            tokenizer=tokenizer,
            patch_size=PATCH_SIZE,
        ),
        named_tokens={
            "image_token": "<|image|>",
            "patch_token": "<|patch|>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
        },
        placeholder_tokens=("patch_token",),
        video_prompt="",
        image_prompt="<|image|>\n",
        reads_videos=False,
        takes_chunks=False,
        chains_only=chains_only,
    )


_LLAMA4 = (
    _llama4("llama4", chains_only="chunked_attention"),
    _llama4("llama4-full", chains_only="counts positions itself", layer_types=["full_attention"] * 4),
)

HYBRID_FAMILIES: tuple[Family, ...] = (*_WINDOWED, *_CHAINS_ONLY, *_LLAMA4)
