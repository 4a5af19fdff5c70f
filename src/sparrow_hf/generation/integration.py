"""`generate(assistant_model=draft)` dispatches to our loop, once the call was checked."""

from typing import Any

from transformers.generation import GenerationMode

from .._transformers import attention_of, install_seam, is_stateful
from ..errors import UnsupportedGenerationError
from ..modeling_sparrow import SparrowDraftModel
from .decoding import speculative_decode


def install() -> None:
    """Installs the seam. Idempotent; runs when `sparrow_hf` is imported."""
    install_seam(lambda model: isinstance(model, SparrowDraftModel), check_call, speculative_decode)


def check_call(
    target: Any,
    draft: SparrowDraftModel,
    generation_mode: Any,
    generation_config: Any,
    generation_mode_kwargs: dict[str, Any],
) -> None:
    """Checks a `generate()` call with a draft and binds the draft, before anything is computed."""
    check_request(generation_mode, generation_config, generation_mode_kwargs, target)
    follow(draft, target)


def follow(draft: SparrowDraftModel, target: Any) -> None:
    """Binds the draft to the target if it is not yet, and brings it to the target's device.

    On first use the dtype follows too; a draft somebody bound before (to train it in fp32, say) keeps its own.
    """
    first_use = draft._target is None
    view = draft.bind(target)
    if first_use and draft.dtype != view.dtype:
        draft.to(dtype=view.dtype)
    if draft.device != view.device:
        draft.to(device=view.device)


def check_request(
    generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any], target: Any
) -> None:
    """Raises [`UnsupportedGenerationError`] for what cannot be combined with a draft, before anything is computed."""
    found: list[str] = []
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        found.append(f"{generation_mode.value} (num_beams={generation_config.num_beams})")
    if (generation_config.num_return_sequences or 1) > 1:
        found.append(f"num_return_sequences={generation_config.num_return_sequences}")
    if generation_config.assistant_ensemble_weight is not None:
        found.append("assistant_ensemble_weight (it would change the output)")
    if generation_config.use_cache is False:
        found.append("use_cache=False")
    if generation_config.cache_implementation not in (None, "dynamic"):
        found.append(f"cache_implementation={generation_config.cache_implementation!r}")
    if generation_mode_kwargs.get("synced_gpus"):
        found.append("synced_gpus (ZeRO-3 or FSDP generation)")
    if generation_config.prompt_lookup_num_tokens is not None:
        found.append("prompt_lookup_num_tokens")
    attention = attention_of(target.config.get_text_config())
    if "flash" in attention:
        # Verification needs a 4-D mask; FlashAttention would drop it and accept wrong tokens without a word.
        found.append(f"attn_implementation={attention!r} (load the target with 'sdpa')")
    if is_stateful(target):
        found.append("a stateful target (its state cannot step back over rejected tokens)")
    if found:
        raise UnsupportedGenerationError(f"cannot be combined with a Sparrow draft: {'; '.join(found)}")
