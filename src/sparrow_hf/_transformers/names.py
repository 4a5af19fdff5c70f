"""Names of transformers that differ between its versions, or lie where they may move."""

import importlib
from dataclasses import fields
from typing import Any

_not_found: list[str] = []


def _find(module: str, name: str) -> Any:
    """`module.name`, or `None`, noted as missing: an import of the package must not fail for a version."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        _not_found.append(f"{module}.{name}")
        return None


# Public names too, because no class of the package can be defined without them.
for _name in ("Cache", "DynamicCache", "GenerationConfig", "PreTrainedConfig", "PreTrainedModel"):
    _find("transformers", _name)
for _name in ("BaseStreamer", "CandidateGenerator"):
    _find("transformers.generation", _name)
_find("transformers.initialization", "copy_")

GenerationMixin: Any = _find("transformers.generation", "GenerationMixin")
DecoderOutput: Any = _find("transformers.modeling_outputs", "BaseModelOutputWithPast")
GenerationMode: Any = _find("transformers.generation", "GenerationMode")
GenerateOutput: Any = _find("transformers.generation", "GenerateDecoderOnlyOutput")
#: Activation functions by name.
ACTIVATIONS: Any = _find("transformers.activations", "ACT2FN")
ATTENTION_FUNCTIONS: Any = _find("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")
MASK_FUNCTIONS: Any = _find("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS")
flat_mask: Any = _find("transformers.masking_utils", "flash_attention_mask")
# A class of this room derives from it.
DynamicLayer: Any = _find("transformers.cache_utils", "DynamicLayer") or object
layer_types_of: Any = _find("transformers.cache_utils", "get_layer_types_and_kwargs")
LlamaRMSNorm: Any = _find("transformers.models.llama.modeling_llama", "LlamaRMSNorm")
LlamaRotaryEmbedding: Any = _find("transformers.models.llama.modeling_llama", "LlamaRotaryEmbedding")

#: `block_type` of a draft → its decoder layer.
DECODER_LAYERS: dict[str, Any] = {
    "qwen2": _find("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer"),
    "qwen3": _find("transformers.models.qwen3.modeling_qwen3", "Qwen3DecoderLayer"),
    "llama": _find("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"),
}

#: What `generate()`, the models' forward and their outputs call the cache: `cache` since 5.24.
CACHE: str = (
    "cache"
    if GenerateOutput is None or "cache" in {field.name for field in fields(GenerateOutput)}
    else "past_key_values"
)


def missing_names() -> list[str]:
    """Names without which the package's classes cannot be defined."""
    return list(_not_found)
