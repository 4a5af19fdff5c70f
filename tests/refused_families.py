"""Families that drafts are refused for."""

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
    VIDEO_PIXELS,
    VISION_SIZES,
    processor_of,
    qwen_ids,
)

from tiny_targets import FRAME_SIZE, HIDDEN_SIZE, Family

REFUSED_FAMILIES: list[Family] = [
    Family(
        name="dots3_note",
        model_class=hf.Dots3NoteForConditionalGeneration,
        config=lambda text, tokens: hf.Dots3NoteConfig(
            text_config=text
            | LATENT_ATTENTION
            | {
                "head_dim": 16,
                "layer_types": ["indexed_attention", "sliding_attention"] * 2,
                "sliding_window": 16,
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "index_topk": 16,
                "index_head_dim": 8,
                "index_n_heads": 2,
                "shared_experts_intermediate_size": 16,
                "per_layer_config": {},
                "tie_word_embeddings": False,
            },
            vision_config=VISION_SIZES
            | {
                "moe_intermediate_size": 16,
                "mlp_layer_types": ["dense", "sparse"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "adapter_in_dim": 16,
                "adapter_out_dim": HIDDEN_SIZE,
                "per_layer_config": {},
            },
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "adapter_input_size": 16,
                "adapter_out_dim": HIDDEN_SIZE,
                "downsample_hidden_size": 8,
                "conv_output_size": 128,
            },
            **{f"{kind}_token_id": tokens[f"{kind}_token"] for kind in ("image", "video", "audio")},
        ),
        processor=lambda tokenizer: hf.Dots3NoteProcessor(
            image_processor=hf.Qwen2VLImageProcessor(**MERGED_PATCHES, temporal_patch_size=1, size=PIXELS),
            tokenizer=tokenizer,
            video_processor=hf.Qwen3VLVideoProcessor(
                **MERGED_PATCHES, temporal_patch_size=1, size=VIDEO_PIXELS, cap_pixels_per_frame=False
            ),
            feature_extractor=hf.Dots3NoteFeatureExtractor(),
        ),
        named_tokens={
            "image_token": "<|imgpad|>",
            "video_token": "<|video_pad|>",
            "audio_token": "<|audio_comp_pad|>",
        },
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="<|video_pad|>\n",
        image_prompt="<|imgpad|>\n",
        refused="indexed_attention",
    ),
    Family(
        name="qwen4_exp",
        model_class=hf.Qwen4ExpForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen4ExpConfig(
            text_config={name: value for name, value in text.items() if name != "intermediate_size"}
            | QWEN3_TEXT
            | EXPERTS
            | {
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": HEAD_SIZE,
                "linear_value_head_dim": HEAD_SIZE,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "num_experts": 4,
                "shared_expert_intermediate_size": 16,
                "layer_types": ["linear_attention", "indexed_attention"] * 2,
                "hc_count": 2,
                "hc_lowrank": 8,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 16,
                "indexer_compress_ratio": 2,
                "ple_layer_ids": [],
            },
            vision_config=QWEN3_VISION_SIZES,
            **qwen_ids(tokens),
        ),
        **QWEN3_REST,
        refused="indexed_attention",
    ),
]
if hasattr(hf, "HYV4VLForConditionalGeneration"):  # since transformers 5.24
    REFUSED_FAMILIES.append(
        Family(
            name="hy_v4_vl",
            model_class=hf.HYV4VLForConditionalGeneration,
            config=lambda text, tokens: hf.HYV4VLConfig(
                text_config=text
                | LATENT_ATTENTION
                | {
                    "head_dim": 8,
                    "rope_parameters": MROPE,
                    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                    "layer_types": ["indexed_attention"] * 4,
                    "index_topk": 16,
                    "index_head_dim": 8,
                    "index_n_heads": 2,
                    "indexer_types": ["full"] * 4,
                    "hc_mult": 2,
                    "tie_word_embeddings": False,
                },
                vision_config=VISION_SIZES
                | {"out_hidden_size": HIDDEN_SIZE, "num_key_value_heads": 2, "max_image_size": FRAME_SIZE},
                tie_word_embeddings=False,
                image_token_id=tokens["image_token"],
                video_token_id=tokens["video_token"],
            ),
            processor=processor_of(
                hf.HYV4VLProcessor,
                hf.HYV4VLImageProcessor(**MERGED_PATCHES),
                hf.HYV4VLVideoProcessor(**MERGED_PATCHES),
            ),
            named_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
            placeholder_tokens=PLACEHOLDERS,
            video_prompt="<|video_pad|>",
            image_prompt="<|image_pad|>",
            attentions=("eager",),
            refused="indexed_attention",
        )
    )
