"""What the fields of a [`SparrowDraftConfig`] may hold: types and ranges, checked before anything is built of them."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ._transformers import ACTIVATIONS
from .errors import DraftConfigError

_LARGEST = 2**31 - 1

#: Field → smallest and largest integer. The largest are far above every published model: a file that says more is
#: damaged, and its model would not fit into any memory.
INTEGERS: dict[str, tuple[int, int]] = {
    "target_num_hidden_layers": (1, 2**12),
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**8),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (1, 2**14),
    "max_position_embeddings": (1, _LARGEST),
    "visual_bridge_layer": (0, 2**12),
    "num_glimpse_tokens": (0, _LARGEST),
    "num_mtp_steps": (1, 2**10),
    "num_tree_nodes": (1, 2**16),
    "num_draft_levels": (0, 2**12),
    "beam_width": (1, 2**12),
    "draft_vocab_size": (1, 2**24),
    "pad_token_id": (-1, _LARGEST),
    "bos_token_id": (-1, _LARGEST),
    "chunk_size_feed_forward": (0, _LARGEST),
    "num_labels": (0, 2**16),
}
#: Field → smallest and largest finite number.
NUMBERS: dict[str, tuple[float, float]] = {
    "initializer_range": (0.0, 100.0),
    "rms_norm_eps": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
    "rope_theta": (1e-6, 1e15),
    "partial_rotary_factor": (1e-6, 1.0),
}
SWITCHES = (
    *("attention_bias", "mlp_bias", "use_cache", "tie_word_embeddings", "input_norm", "output_norm", "fc_bias"),
    *("feature_norm", "project_visual", "output_hidden_states", "return_dict", "is_encoder_decoder"),
)
CHOICES: dict[str, tuple[str, ...]] = {
    "block_type": ("qwen2", "qwen3", "llama"),
    "position_mode": ("compact", "original"),
    "glimpse_spacing": ("even", "logarithmic"),
}
TEXTS = ("target_name_or_path", "target_revision", "target_model_type", "transformers_version", "problem_type")
#: Fields that may be `None`: their default follows from the others, or there is none.
OPTIONAL = (
    *("head_dim", "visual_bridge_layer", "num_tree_nodes", "draft_vocab_size", "pad_token_id", "bos_token_id"),
    *("eos_token_id", "visual_token_ids", "feature_layers", "rope_parameters", "tensors_sha256", "architectures"),
    *("id2label", "label2id", "output_hidden_states", "return_dict", "num_labels", "rope_theta", *TEXTS),
)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises [`DraftConfigError`] for the first field that holds something of another type, or out of range.

    Args:
        fields: Name → value. Names that are not known here do not count.
    """
    for name, value in fields.items():
        if name not in _EXPECTED or (value is None and name in OPTIONAL):
            continue
        expected, is_right = _EXPECTED[name]
        if not is_right(value):
            none = " or None" if name in OPTIONAL else ""
            raise DraftConfigError(f"{name} must be {expected}{none}, found {value!r:.80}")


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    # NaN is in no range.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_list_of_integers(value: Any, low: int, high: int) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_integer(item, low, high) for item in value)


def _is_rope(value: Any) -> bool:
    def is_plain(item: Any) -> bool:
        if isinstance(item, (list, tuple)):
            return all(map(is_plain, item))
        is_finite = not isinstance(item, float) or math.isfinite(item)
        return item is None or (isinstance(item, (str, bool, int, float)) and is_finite)

    theta = value.get("rope_theta", 1.0) if isinstance(value, Mapping) else None
    return theta is not None and _is_number(theta, 1e-6, 1e15) and all(map(is_plain, value.values()))


def _between(low: float, high: float) -> str:
    return f"from {low:,} to {high:,}"


#: Field → what it must be, and whether a value is that.
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{
        name: (f"an integer {_between(low, high)}", partial(_is_integer, low=low, high=high))
        for name, (low, high) in INTEGERS.items()
    },
    **{
        name: (f"a number {_between(low, high)}", partial(_is_number, low=low, high=high))
        for name, (low, high) in NUMBERS.items()
    },
    **{name: ("true or false", lambda value: isinstance(value, bool)) for name in SWITCHES},
    **{
        name: (f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}", choices.__contains__)
        for name, choices in CHOICES.items()
    },
    **{name: ("a text", lambda value: isinstance(value, str)) for name in TEXTS},
    "hidden_act": ("the name of an activation", lambda value: isinstance(value, str) and value in ACTIVATIONS),
    "visual_token_ids": ("a list of token ids", lambda value: _is_list_of_integers(value, 0, _LARGEST)),
    "feature_layers": (
        "a list of target layers (-1: the state after the final norm)",
        lambda value: _is_list_of_integers(value, -1, 2**12) and 0 < len(value) <= 2**12,
    ),
    "eos_token_id": (
        "a token id or a list of them",
        lambda value: _is_integer(value, -1, _LARGEST) or _is_list_of_integers(value, -1, _LARGEST),
    ),
    "rope_parameters": ("an object of finite numbers, with a positive rope_theta", _is_rope),
    "tensors_sha256": (
        "64 hexadecimal digits",
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    ),
    "architectures": (
        "a list of class names",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
    "id2label": ("an object", lambda value: isinstance(value, Mapping)),
    "label2id": ("an object", lambda value: isinstance(value, Mapping)),
    "dtype": (
        "the name of a floating-point dtype",
        lambda value: value is None or isinstance(dtype_of(value), torch.dtype),
    ),
}


def dtype_of(value: Any) -> torch.dtype | None:
    """The floating-point dtype of torch that a value is or names, else `None`."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None
