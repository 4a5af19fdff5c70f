"""`generate(assistant_model=draft)`: checks the call, then runs our loop."""

from typing import Any

import torch
from torch import Tensor

from .._transformers import computes_cache_anew, contract_breaches, install_seam
from ..errors import UnsupportedGenerationError
from ..modeling_sparrow import SparrowDraftModel
from ..targets import TargetView
from .batches import decode_batch
from .decoding import recorded_outputs, speculative_decode
from .grouped_attention import install_grouped_attention
from .refusals import check_inputs, check_modes, check_request
from .self_check import how_to_verify
from .static_decoding import check_fixed_shapes
from .stop_rules import max_length


def install() -> None:
    """Installs the seam. Idempotent; runs when `sparrow_hf` is imported."""
    install_seam(lambda model: isinstance(model, SparrowDraftModel), check_inputs, check_call, decode)
    if not contract_breaches():
        install_grouped_attention()


def decode(target: Any, draft: SparrowDraftModel, input_ids: Tensor, **call: Any) -> Any:
    """Runs the loop for one sequence, or the one for several."""
    longest = max_length(call["stopping_criteria"])
    if call["generation_config"].cache_implementation == "static":
        check_room(len(input_ids), longest, call["generation_config"].max_length)
    check_cache_stays(target, input_ids.shape[1], longest)
    loop = speculative_decode if len(input_ids) == 1 else decode_batch
    return loop(target, draft, input_ids, **call)


def check_room(num_sequences: int, longest: int, room: int) -> None:
    """Whether the buffers of fixed shapes, made for one text of `room` tokens, hold what a call may write.

    Raises:
        UnsupportedGenerationError: There are several sequences, or the criteria admit a longer text.
    """
    if num_sequences > 1:
        raise UnsupportedGenerationError(
            f"cache_implementation='static' with a Sparrow draft decodes one sequence, found {num_sequences} "
            "sequences: call generate() for each, or leave cache_implementation at its default"
        )
    if longest > room:
        raise UnsupportedGenerationError(
            f"cache_implementation='static' has room for max_length={room} tokens, found a MaxLengthCriteria of "
            f"{longest}: raise max_length to it, or leave cache_implementation at its default"
        )


def check_cache_stays(target: Any, length: int, longest: int) -> None:
    """Whether plain decoding of a prompt of `length` tokens to `longest` keeps the rows that it has computed.

    Raises:
        UnsupportedGenerationError: It may compute all of them anew on the way, and others than the first time.
    """
    border = computes_cache_anew(target)
    # The step that reads the first token beyond the border makes one more.
    if border is not None and length <= border < longest - 1:
        raise UnsupportedGenerationError(
            f"plain generate() of {type(target).__name__} computes the whole text anew, with other rotary embeddings, "
            f"where it passes {border} tokens, and a draft cannot follow it there: the prompt has {length} tokens and "
            f"the text may get {longest}; let it end at {border + 1} (max_new_tokens={border + 1 - length}), or "
            "generate without the draft"
        )


def check_call(
    target: Any,
    draft: SparrowDraftModel,
    generation_mode: Any,
    generation_config: Any,
    generation_mode_kwargs: dict[str, Any],
) -> None:
    """Checks a `generate()` call with a draft and binds the draft, before anything is computed."""
    check_request(generation_mode, generation_config, generation_mode_kwargs, target)
    view = follow(draft, target)
    check_modes(draft, view)
    ways = how_to_verify(view)
    if generation_config.cache_implementation == "static":
        check_fixed_shapes(view, ways, recorded_outputs(generation_config))


def follow(draft: SparrowDraftModel, target: Any) -> TargetView:
    """Binds the draft to the target if it is not yet, and brings it to the target's device.

    On first use the draft also takes the target's dtype; a draft that was bound before (for training in fp32, for
    example) keeps its own.
    """
    first_use = draft._target is None
    view = draft.bind(target)
    # Parameters made in inference mode could never be trained.
    with torch.inference_mode(False):
        if first_use and draft.dtype != view.dtype:
            draft.to(dtype=view.dtype)
        if draft.device != view.device:
            draft.to(device=view.device)
    return view
