"""Everything this plugin uses of vLLM that is not for plugins. What is checked here is checked when a draft is loaded.

Tried on 0.32.0. `config.SUPPORTED_VLLM` keeps other versions away; `make canary-vllm` tries the next one.
"""

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

from .config import DraftError
from .rows import Batch

#: The draft's base class is one of those that V1's proposer asks for by name.
Eagle3Base = Eagle3LlamaForCausalLM
#: Names of a layer's weights in files → in vLLM, where some lie in one tensor.
STACKED = LlamaModel.hf_to_vllm_mapper

#: Attention backends whose metadata says what a draft needs → where it is defined.
BACKENDS = {
    "CPU_ATTN": ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionMetadata"),
    "FLASH_ATTN": ("vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadata"),
    "TRITON_ATTN": ("vllm.v1.attention.backends.triton_attn", "TritonAttentionMetadata"),
}
_FIELDS = {"num_actual_tokens", "query_start_loc", "seq_lens", "block_table"}


class LlamaLayer(LlamaDecoderLayer):
    """A Llama layer that is not quantised when the target is; with its biases it is a Qwen2 layer too."""

    def get_quant_config(self, vllm_config: VllmConfig) -> None:
        return None


def decoder_layer(config: Any, vllm_config: VllmConfig, prefix: str) -> Any:
    """One decoder layer of the draft."""
    if config.sparrow["qk_norm"]:
        return Qwen3DecoderLayer(config, vllm_config.cache_config, None, prefix=prefix)
    return LlamaLayer(vllm_config, prefix=prefix, config=config)


def check(vllm_config: VllmConfig, layer: Any) -> None:
    """Raises [`DraftError`] if the engine cannot run the draft: its backend, or how it is distributed."""
    backend = layer.self_attn.attn.attn_backend.get_name()
    if backend not in BACKENDS:
        raise DraftError(
            f"the attention backend {backend} does not say which rows belong to which request: add "
            '"attention_backend": "FLASH_ATTN" (or "TRITON_ATTN") to --speculative-config'
        )
    module, name = BACKENDS[backend]
    found = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name))}
    if missing := _FIELDS - found:
        raise DraftError(f"{name} of this vLLM has no {', '.join(sorted(missing))}: install a supported version")
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        raise DraftError("a Sparrow draft runs without pipeline and context parallelism: use tensor parallelism")
    if vllm_config.kv_transfer_config is not None:
        raise DraftError("a Sparrow draft cannot be served with KV transfer, which leaves out its memory of rows")


def new_memory(vllm_config: VllmConfig, device: torch.device) -> Tensor | None:
    """`(slots + 1,)` integers, one per KV slot and one for padding; `None` before the KV cache has its size."""
    cache = vllm_config.cache_config
    if not cache.num_gpu_blocks:
        return None
    return torch.zeros(cache.num_gpu_blocks * cache.block_size + 1, dtype=torch.int64, device=device)


def current_batch(vllm_config: VllmConfig, layer_name: str) -> Batch | None:
    """What the forward that runs now works on; `None` in a dry run."""
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    mine = metadata[layer_name]
    return Batch(
        num_rows=mine.num_actual_tokens,
        starts=mine.query_start_loc,
        lengths=mine.seq_lens,
        blocks=mine.block_table,
        block_size=vllm_config.cache_config.block_size,
        max_length=vllm_config.model_config.max_model_len,
    )


def put_slots(layer_name: str, slots: Tensor) -> None:
    """Makes the draft's keys and values go to these slots.

    From its second step on, the V1 runner derives them from M-RoPE's temporal positions, which are not indices
    (vllm#54498). Slots that the runner left out stay left out.
    """
    given = get_forward_context().slot_mapping[layer_name][: len(slots)]
    given.copy_(torch.where(given < 0, given, slots))
