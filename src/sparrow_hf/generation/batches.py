"""The speculative loop of a `generate()` call with several sequences. Reads like `decoding.py`, which has one.

Every sequence is drafted for with a chain, and one forward verifies the chains of all. `batch_emission.py` tells of
the two paces at which sequences take what they accept.
"""

import warnings
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from .. import _transformers
from .._transformers import CACHE
from ..clocks import PhaseClock
from ..hidden_states import HiddenStateCollector, RowCollectors
from ..modeling_sparrow import SparrowDraftModel
from ..targets import TargetView
from .batch_drafts import BatchDrafter
from .batch_emission import BatchEmitter, treats_rows_alone
from .caches import RaggedCache, hold
from .candidate_generator import SparrowCandidateGenerator
from .decoding import num_new_positions, prefill, recorded_outputs, returned
from .refusals import check_inputs
from .self_check import Verification, how_to_verify
from .stats import GenerationStats
from .tree import build_chains
from .verifiers import TargetVerifier


def decode_batch(
    target: PreTrainedModel,
    draft: SparrowDraftModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> Any:
    """Decodes B sequences with a bound draft; inputs and outputs as those of `speculative_decode`.

    Returns:
        The `(B, L + new)` ids, or a [`~transformers.generation.GenerateDecoderOnlyOutput`].
    """
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    check_inputs(target, input_ids, embeds, model_kwargs[CACHE], mask)
    # Not `draft.target`, which a call with another target may replace.
    view = draft.bind(target)
    ways = how_to_verify(view)
    in_step = not may_part(view, ways, logits_processor, generation_config, model_kwargs)
    emitter = BatchEmitter(input_ids, logits_processor, stopping_criteria, generation_config, streamer, in_step)
    recorded = recorded_outputs(generation_config)
    outlives_call = _transformers.outlives_call(model_kwargs[CACHE], generation_config)
    if not outlives_call:
        _transformers.grow_in_place(model_kwargs[CACHE])
    clock = PhaseClock(draft.device)
    stats = GenerationStats(draft.config.tree_shape.num_draft_levels, clock, num_sequences=len(input_ids))
    draft.last_generation = stats
    if draft.config.beam_width > 1:
        warnings.warn(
            f"a batch is verified as chains: the draft proposes chains of {draft.config.num_draft_levels} tokens "
            "instead of trees",
            stacklevel=2,
        )

    # Prefill. Only what is new to the target's cache passes the hooks.
    new = num_new_positions(input_ids, generation_config, model_kwargs)
    with clock.phase("draft"):
        prompts = input_ids[:, -new:].to(draft.device)
        masks = None if mask is None else mask[:, -new:].to(draft.device)
        readers = [
            SparrowCandidateGenerator(draft, ids[None], None if masks is None else masks[row : row + 1])
            for row, ids in enumerate(prompts)
        ]
        reading = RowCollectors([HiddenStateCollector(reader.layers_to_collect) for reader in readers])
    with clock.phase("prefill"), reading.active():
        logits, first_position, model_kwargs = prefill(target, input_ids, generation_config, model_kwargs, recorded)
    if not in_step and model_kwargs.get("attention_mask") is None:
        # Prompts without padding have none; rows behind the end of a sequence need one.
        model_kwargs["attention_mask"] = input_ids.new_ones((len(input_ids), model_kwargs[CACHE].get_seq_length()))
    first_tokens = emitter.start(logits)
    stats.new_tokens = len(first_tokens)
    del logits
    if not emitter.finished:
        with clock.phase("draft"):
            for reader, states, token in zip(readers, reading.rows, first_tokens, strict=True):
                reader.prefill({layer: states.take(layer) for layer in reader.layers_to_collect}, token)
            drafter = BatchDrafter(draft, readers)
    del reading, readers

    cache = model_kwargs[CACHE]
    held = hold(cache) if in_step else RaggedCache(cache, emitter.new_tokens)
    verifier = TargetVerifier(view, ways, draft.config.feature_layer_ids, first_position, model_kwargs, held, recorded)
    try:
        with _transformers.decoding(target):
            while not emitter.finished:
                open_rows = emitter.open_rows
                with clock.phase("draft"):
                    drafter.keep(open_rows)
                    levels = min(emitter.budget - 1, verifier.max_levels())
                    tree = build_chains(
                        drafter.propose(emitter.roots.to(view.device), emitter.fill.to(view.device), levels)
                    )
                    chains = tree.token_ids.tolist()
                with clock.phase("verify"), verifier.verifying(tree) as (logits, path):
                    taken = emitter.accept(logits, chains, path)
                stats.accepted += [num_accepted(taken[row], chains[row]) for row in open_rows]
                stats.new_tokens = emitter.num_text_tokens
                if not emitter.finished:
                    with clock.phase("draft"):
                        drafter.keep(emitter.open_rows)
                        drafter.extend(verifier.features(path), taken)
                stats.max_draft_cache_length = drafter.max_cache_length
                stats.failed_drafts = drafter.failed_drafts
    finally:
        with _transformers.decoding(target), clock.phase("verify"):
            verifier.close(outlives_call)
        # A logits processor may have called generate() with the draft itself.
        draft.last_generation = stats

    if streamer is not None:
        streamer.end()
    return returned(emitter, recorded, cache, generation_config)


def may_part(
    view: TargetView,
    ways: Verification,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> bool:
    """Whether each sequence may go at its own pace: nothing that is asked for, or remains, ties one to another."""
    return (
        # A draw is one for the whole batch.
        not generation_config.do_sample
        and treats_rows_alone(logits_processor)
        # A cache that outlives the call, and returned scores, are those of columns.
        and not _transformers.outlives_call(model_kwargs[CACHE], generation_config)
        # Positions are not those of the rows, and rows behind the end of a sequence are masked: a target that verifies
        # trees takes the ones and follows the others.
        and ways.trees is not None
        and _transformers.makes_masks(_transformers.attention_of(view.text_config))
        and set(view.layer_kinds) <= {"full_attention", _transformers.NO_CACHE}
        # The frequencies of a forward follow the longest position in it.
        and not view.rope_borders
    )


def num_accepted(taken: list[int], chain: list[int]) -> int:
    """How many drafted tokens of its chain a sequence took in a round."""
    return sum(token == drafted for token, drafted in zip(taken, chain[1:], strict=False))
