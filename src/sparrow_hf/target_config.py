"""What the configuration of a draft takes over from that of its target."""

import os
from typing import Any

from transformers import PreTrainedConfig

from ._transformers import ACTIVATIONS, commit_of, first_layer_config, name_of
from .errors import UnsupportedTargetError

#: Text decoder of the target → the plain-text decoder layer of transformers that has its exact shape. Others get a
#: Llama layer: the draft reads the target's states, so its own layer need not be of the target's kind.
_BLOCK_OF_TEXT_MODEL: dict[str, str] = {
    "qwen2": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3": "qwen3",
    "qwen3_vl_text": "qwen3",
    "llama": "llama",
    "mistral": "llama",
}

#: Names under which the families keep the ids of their visual placeholders.
_PLACEHOLDER_FIELDS = (
    "image_token_id",
    "video_token_id",
    "image_token_index",
    "video_token_index",
    "image_patch_id",
    "media_placeholder_token_id",
)

#: Field of a draft's layer → its type, and what text decoders call it, the draft's own name first.
_LAYER_FIELDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "intermediate_size": (int, ("dense_intermediate_size", "intermediate_size", "ffn_dim")),
    "num_attention_heads": (int, ("num_attention_heads",)),
    "num_key_value_heads": (int, ("num_key_value_heads",)),
    "head_dim": (int, ("head_dim",)),
    "hidden_act": (str, ("hidden_act", "hidden_activation")),
    "rms_norm_eps": (float, ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")),
    "max_position_embeddings": (int, ("max_position_embeddings",)),
    "initializer_range": (float, ("initializer_range",)),
    "attention_bias": (bool, ("attention_bias",)),
    "mlp_bias": (bool, ("mlp_bias",)),
}

#: Kinds of RoPE whose frequencies a draft takes over. Of the others it takes the base alone: some have frequencies for
#: a part of a head only, some follow the longest position of a forward.
_FIXED_ROPE_TYPES = ("linear", "llama3", "yarn")


def fields_for(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of the [`SparrowDraftConfig`] of a draft that fits a target with this configuration.

    Raises:
        UnsupportedTargetError: The text decoder has no number of layers, no vocabulary or no width.
    """
    text = target_config.get_text_config()
    sizes = ("num_hidden_layers", "vocab_size", "hidden_size")
    if missing := [field for field in sizes if not isinstance(getattr(text, field, None), int)]:
        raise UnsupportedTargetError(
            f"the text decoder of a {target_config.model_type} says no {', '.join(missing)}; Sparrow needs a "
            "decoder-only video LLM of transformers"
        )
    block_type = _BLOCK_OF_TEXT_MODEL.get(text.model_type, "llama")
    name = published_name(target_config)
    fields: dict[str, Any] = {
        "target_name_or_path": name,
        "target_revision": None if name is None else commit_of(target_config),
        "target_model_type": target_config.model_type,
        "target_num_hidden_layers": text.num_hidden_layers,
        "visual_token_ids": visual_token_ids(target_config),
        "feature_layers": feature_layers_of(text.num_hidden_layers),
        "block_type": block_type,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        # Qwen2 attention always has its bias and no field for it.
        "attention_bias": block_type == "qwen2",
        **_layer_fields(text),
    }
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        # `pipeline(assistant_model=)` compares these three with the target's text configuration.
        fields[field] = getattr(text, field, None)
    return fields


def feature_layers_of(num_layers: int) -> list[int]:
    """An early, a middle and a late layer of a target, as far as it has them, and its last one.

    These are the three of EAGLE-3 (arXiv 2503.01840) and the one of EAGLE. On a language model that writes English a
    draft of all four accepts more than one of either (docs/language.md, "Rivals").
    """
    chosen = {2, num_layers // 2, num_layers - 3}
    return [*sorted(layer for layer in chosen if 0 < layer < num_layers), -1]


def _layer_fields(text: PreTrainedConfig) -> dict[str, Any]:
    """What a draft's layer takes over from a text decoder; a field of another form is left to the draft's default."""
    fields: dict[str, Any] = {}
    layer = first_layer_config(text)
    for field, (kind, names) in _LAYER_FIELDS.items():
        found = (getattr(layer, name, None) for name in names)
        # Some decoders have one value per layer.
        found = (value[0] if isinstance(value, (list, tuple)) and value else value for value in found)
        value = next((value for value in found if type(value) is kind), None)
        if value is not None:
            fields[field] = value
    heads = fields.setdefault("num_attention_heads", max(text.hidden_size // 64, 1))
    fields.setdefault("intermediate_size", 4 * text.hidden_size)
    if heads % fields.setdefault("num_key_value_heads", heads):
        fields["num_key_value_heads"] = heads
    # RoPE rotates pairs.
    fields["head_dim"] = fields.get("head_dim", text.hidden_size // heads) // 2 * 2
    if fields.get("hidden_act") not in ACTIVATIONS:
        fields.pop("hidden_act", None)
    return fields | {"rope_parameters": _rope_parameters(text)}


def _rope_parameters(text: PreTrainedConfig) -> dict[str, Any]:
    """The rotary embedding of a draft: the target's, as far as it holds for one position per text token."""
    rope = getattr(text, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        # One for each kind of layer.
        rope = rope.get("full_attention") or next(iter(rope.values()))
    # Text tokens have one position each, so the multimodal sections of the target's RoPE do not apply.
    rope = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    if rope.get("rope_type") in _FIXED_ROPE_TYPES and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return rope
    return {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10000.0}


def published_name(target_config: PreTrainedConfig) -> str | None:
    """Hub id of the target; empty for a folder, because a path of one machine is useless on another."""
    name = name_of(target_config)
    return None if not name or os.path.isdir(name) else name


def visual_token_ids(target_config: PreTrainedConfig) -> list[int]:
    """Sorted placeholder ids of images and videos in a target's configuration."""
    ids = {getattr(target_config, name, None) for name in _PLACEHOLDER_FIELDS}
    return sorted(token_id for token_id in ids if token_id is not None)
