"""Exact shapes of three published 7B video LLMs, without a single weight.

The configurations are those of the checkpoints on the Hub, reduced to the fields that decide a shape or a token id.
Built on the meta device, a target costs no memory; what is checked on it (layers, vocabulary, head, ids) is what a
draft must fit before anyone downloads 16 GB.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

#: Text decoder of Qwen2-7B, which all three share.
_QWEN2_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
_QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class MetaTarget:
    """A published checkpoint.

    Args:
        name: Its repository on the Hub.
        num_parameters: What the model card says, in billions.
    """

    name: str
    model_class: type[hf.PreTrainedModel]
    config: Callable[[], hf.PreTrainedConfig]
    num_parameters: float

    def build(self) -> hf.PreTrainedModel:
        """The target on the meta device, in the dtype of the checkpoint."""
        with torch.device("meta"):
            return self.model_class._from_config(self.config(), dtype=torch.bfloat16).eval()


META_TARGETS: tuple[MetaTarget, ...] = (
    MetaTarget(
        name="Qwen/Qwen2.5-VL-7B-Instruct",
        model_class=hf.Qwen2_5_VLForConditionalGeneration,
        config=lambda: hf.Qwen2_5_VLConfig(
            text_config=_QWEN2_7B | {"max_position_embeddings": 128000, "rope_parameters": dict(_MROPE)},
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
            },
            **_QWEN_IDS,
        ),
        num_parameters=8.29,
    ),
    MetaTarget(
        name="Qwen/Qwen2-VL-7B-Instruct",
        model_class=hf.Qwen2VLForConditionalGeneration,
        config=lambda: hf.Qwen2VLConfig(
            text_config=_QWEN2_7B | {"rope_parameters": dict(_MROPE)},
            vision_config={
                "depth": 32,
                "embed_dim": 1280,
                "mlp_ratio": 4,
                "num_heads": 16,
                "hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            **_QWEN_IDS,
        ),
        num_parameters=8.29,
    ),
    MetaTarget(
        name="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        model_class=hf.LlavaOnevisionForConditionalGeneration,
        config=lambda: hf.LlavaOnevisionConfig(
            # Two placeholders were added to the vocabulary, which was then padded to a multiple of 64.
            text_config=_QWEN2_7B
            | {
                "model_type": "qwen2",
                "vocab_size": 152128,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "tie_word_embeddings": False,
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
                "vision_use_head": False,
            },
            image_token_index=151646,
            video_token_index=151647,
            tie_word_embeddings=False,
        ),
        num_parameters=8.03,
    ),
)
