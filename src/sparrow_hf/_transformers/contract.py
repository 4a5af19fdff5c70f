"""What the package needs of the installed transformers, and what of it is broken."""

import functools
import importlib
import inspect
from typing import Any

import torch
import transformers

from ..errors import TransformersContractError
from .caches import cache_tensors, drop_newest
from .names import CACHE, DECODER_LAYERS, DecoderOutput, GenerateOutput, GenerationMixin, missing_names

#: Oldest and newest version that the tests ran on; `docs/compatibility.md` says when.
TESTED_VERSIONS = ("5.23.0", "5.24.0")
SUPPORTED_VERSIONS = ">=5.23,<5.25"

#: Methods of `GenerationMixin` that the package wraps or calls, with the parameters it passes.
_METHODS = {
    "generate": {
        "inputs",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "assistant_model",
        "streamer",
        "kwargs",
    },
    "_assisted_decoding": {
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "inputs_tensor",
        "assistant_model",
        "tokenizer",
    },
    "_validate_generation_mode": {"generation_mode", "generation_config", "generation_mode_kwargs"},
    "_prefill": {"input_ids", "generation_config", "model_kwargs"},
    "_update_model_kwargs_for_generation": {"outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"},
    "_optimize_model_for_decode": {"self"},
    "_supports_default_dynamic_cache": set(),
    "_valid_auto_compile_criteria": {"model_kwargs", "generation_config"},
    "_prepare_position_ids_for_generation": {"inputs_tensor", "model_kwargs"},
    "_get_candidate_generator": {"generation_config"},
    "prepare_inputs_for_generation": {"next_sequence_length", "is_first_iteration", CACHE},
}

_LAYER_ARGUMENTS = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", CACHE}

#: Attributes that are read of configurations and models.
_ATTRIBUTES = {
    "PreTrainedConfig": ("_name_or_path", "_attn_implementation", "get_text_config"),
    "PreTrainedModel": ("get_decoder", "get_input_embeddings", "get_output_embeddings", "_default_compile_config"),
}


@functools.cache
def contract_breaches() -> tuple[str, ...]:
    """What this package needs and the installed transformers lacks or does differently; empty if all is well."""
    found = [f"{name} is missing" for name in missing_names()]
    if not found:
        found += _changed_methods() + _changed_attributes() + _changed_cache()
    return tuple(found)


def check_contract() -> None:
    """Raises [`TransformersContractError`] if the installed transformers breaks the contract."""
    if breaches := contract_breaches():
        raise TransformersContractError(
            f"a Sparrow draft cannot be used with transformers {transformers.__version__}: {'; '.join(breaches)}. "
            f"sparrow-hf was tested with transformers {' to '.join(TESTED_VERSIONS)}: install "
            f'"transformers{SUPPORTED_VERSIONS}", or a newer sparrow-hf. generate() without a draft works as before.'
        )


def _changed_methods() -> list[str]:
    changed = []
    for name, needed in _METHODS.items():
        changed += _lacking(f"GenerationMixin.{name}", getattr(GenerationMixin, name, None), needed)
    for layer in DECODER_LAYERS.values():
        changed += _lacking(f"{layer.__name__}.forward", layer.forward, _LAYER_ARGUMENTS)
    for output, needed in ((GenerateOutput, {"sequences", "scores", "logits", CACHE}), (DecoderOutput, {CACHE})):
        changed += _lacking(output.__name__, output, needed)
    modes = getattr(importlib.import_module("transformers.generation.utils"), "GENERATION_MODES_MAPPING", {})
    if "_assisted_decoding" not in modes.values():
        changed.append("generate() does not call GenerationMixin._assisted_decoding")
    return changed


def _lacking(name: str, function: Any, needed: set[str]) -> list[str]:
    if function is None:
        return [f"{name} is missing"]
    lacking = needed - set(inspect.signature(function).parameters)
    return [f"{name} takes no {', '.join(sorted(lacking))}"] if lacking else []


def _changed_attributes() -> list[str]:
    return [
        f"{name}.{attribute} is missing"
        for name, attributes in _ATTRIBUTES.items()
        for attribute in attributes
        if not _has(getattr(transformers, name), attribute)
    ]


def _has(kind: type, attribute: str) -> bool:
    # Some attributes of a configuration exist on its objects only.
    return hasattr(kind, attribute) or (kind is transformers.PreTrainedConfig and hasattr(kind(), attribute))


def _changed_cache() -> list[str]:
    """The layers of a dynamic cache must show their tensors, not copies, and it must drop its newest positions."""
    try:
        cache = transformers.DynamicCache()
        states = torch.arange(3.0).view(1, 1, 3, 1)
        cache.update(states, states + 3, 0)
        for tensors in cache_tensors(cache):
            for tensor in tensors:
                tensor[:, :, 1] = tensor[:, :, 2]
        drop_newest(cache, 1)
        kept = [tensor.flatten().tolist() for tensors in cache_tensors(cache) for tensor in tensors]
        works = kept == [[0.0, 2.0], [3.0, 5.0]] and cache.get_seq_length() == 2
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return [f"DynamicCache cannot be cut back ({type(error).__name__}: {error})"]
    return [] if works else ["DynamicCache.crop keeps the wrong positions"]
