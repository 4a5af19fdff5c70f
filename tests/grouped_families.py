"""Targets whose query heads share KV heads in the proportions of the real models, four and seven to one."""

from dataclasses import replace
from functools import cache
from typing import Any

import transformers as hf
from hybrid_families import PER_LAYER_EMBEDDINGS, WINDOWS_AND_FULL, gemma
from transformers import PreTrainedModel

from families import FAMILY_BY_NAME
from tiny_targets import Family

_HEAD_SIZE = 8


def _seven_to_one() -> Family:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    width = 14 * _HEAD_SIZE
    sizes = {"hidden_size": width, "num_attention_heads": 14, "num_key_value_heads": 2}

    def config(text: dict[str, Any], tokens: dict[str, int]) -> hf.PreTrainedConfig:
        made = family.config(text | sizes, tokens)
        made.vision_config.out_hidden_size = width
        return made

    return replace(family, name="qwen2_5_vl-7:1", config=config)


def _gemma(name: str, **text_fields: Any) -> Family:
    return gemma(name, **WINDOWS_AND_FULL, num_attention_heads=8, num_key_value_heads=2, **text_fields)


#: Each with the groups of its kinds of layers.
GROUPED_FAMILIES: tuple[tuple[Family, dict[str, int]], ...] = (
    (_seven_to_one(), {"full_attention": 7}),
    (_gemma("gemma4-4:1"), {"sliding_attention": 4, "full_attention": 4}),
    (
        _gemma("gemma4-4:1-8:1", per_layer_config={layer: {"num_key_value_heads": 1} for layer in (1, 3)}),
        {"sliding_attention": 4, "full_attention": 8},
    ),
    (
        _gemma("gemma4-4:1-1:1", per_layer_config={layer: {"num_key_value_heads": 8} for layer in (1, 3)}),
        {"sliding_attention": 4},
    ),
    (
        _gemma("gemma4-shared-4:1", num_kv_shared_layers=2, **PER_LAYER_EMBEDDINGS),
        {"sliding_attention": 4, "full_attention": 4},
    ),
)

FAMILY = {family.name: family for family, _ in GROUPED_FAMILIES}
GROUPS = {family.name: groups for family, groups in GROUPED_FAMILIES}


@cache
def target_of(name: str, attention: str) -> PreTrainedModel:
    return FAMILY[name].build_target(attention)
