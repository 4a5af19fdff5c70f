"""The one seam to transformers: `generate(assistant_model=draft)` dispatches to our loop.

transformers has no registry for assisted decoding, so `GenerationMixin._assisted_decoding` and
`_validate_generation_mode` are wrapped, once and at class level. Calls without a Sparrow draft pass through untouched.
"""

import functools
import inspect
from typing import Any

import transformers
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from ..errors import TransformersContractError, UnsupportedGenerationError
from ..modeling_sparrow import SparrowDraftModel
from .decoding import speculative_decode

#: Internals of `GenerationMixin` this package builds on, with the parameters it passes.
_CONTRACT = {
    "_assisted_decoding": {
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "streamer",
        "assistant_model",
    },
    "_validate_generation_mode": {"generation_mode", "generation_config", "generation_mode_kwargs"},
    "_prefill": {"input_ids", "generation_config", "model_kwargs"},
    "_update_model_kwargs_for_generation": {"outputs", "model_kwargs", "num_new_tokens"},
    "prepare_inputs_for_generation": {"next_sequence_length", "is_first_iteration", "past_key_values"},
}


def check_contract() -> None:
    """Raises [`TransformersContractError`] if the installed transformers lacks an internal the package needs."""
    for name, needed in _CONTRACT.items():
        method = getattr(GenerationMixin, name, None)
        found = set(inspect.signature(method).parameters) if method is not None else set()
        if not needed <= found:
            raise TransformersContractError(
                f"transformers {transformers.__version__} is not supported: GenerationMixin.{name} lacks "
                f"{', '.join(sorted(needed - found))}. Install transformers>=5.23,<6."
            )


def install() -> None:
    """Installs the seam. Idempotent; runs when `sparrow_hf` is imported."""
    if hasattr(GenerationMixin._assisted_decoding, "_sparrow"):
        return
    check_contract()
    stock_decode = GenerationMixin._assisted_decoding
    stock_validate = GenerationMixin._validate_generation_mode

    # `wraps`: generate() inspects the signature of the method it is about to call.
    @functools.wraps(stock_decode)
    def _assisted_decoding(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draft = kwargs.get("assistant_model")
        if not isinstance(draft, SparrowDraftModel):
            return stock_decode(self, input_ids, *args, **kwargs)
        kwargs.pop("assistant_model")
        kwargs.pop("synced_gpus", None)
        kwargs.pop("inputs_tensor", None)
        kwargs.pop("tokenizer", None)
        return speculative_decode(
            self,
            draft,
            input_ids,
            logits_processor=kwargs.pop("logits_processor"),
            stopping_criteria=kwargs.pop("stopping_criteria"),
            generation_config=kwargs.pop("generation_config"),
            streamer=kwargs.pop("streamer", None),
            model_kwargs=kwargs,
        )

    @functools.wraps(stock_validate)
    def _validate_generation_mode(
        self: Any, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        draft = generation_mode_kwargs.get("assistant_model")
        if isinstance(draft, SparrowDraftModel):
            check_request(generation_mode, generation_config, generation_mode_kwargs, self)
            follow(draft, self)
        stock_validate(self, generation_mode, generation_config, generation_mode_kwargs)

    _assisted_decoding._sparrow = True  # type: ignore[attr-defined]
    GenerationMixin._assisted_decoding = _assisted_decoding
    GenerationMixin._validate_generation_mode = _validate_generation_mode


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
    attention = target.config.get_text_config()._attn_implementation or ""
    if "flash" in attention:
        # Verification needs a 4-D mask; FlashAttention would drop it and accept wrong tokens without a word.
        found.append(f"attn_implementation={attention!r} (load the target with 'sdpa')")
    if target._is_stateful:
        found.append("a stateful target (its state cannot step back over rejected tokens)")
    if found:
        raise UnsupportedGenerationError(f"cannot be combined with a Sparrow draft: {'; '.join(found)}")
