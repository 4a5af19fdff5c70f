"""The speculative loop of one `generate()` call: prefill, then rounds of propose, verify, walk, commit."""

import warnings
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from .. import _transformers
from .._transformers import CACHE, GenerateOutput
from ..clocks import PhaseClock
from ..hidden_states import HiddenStateCollector
from ..modeling_sparrow import SparrowDraftModel
from ..targets import TargetView
from .caches import hold
from .candidate_generator import SparrowCandidateGenerator
from .emission import TokenEmitter, likeliest
from .fixed_steps import traces_steps
from .refusals import check_inputs
from .self_check import how_to_verify
from .static_decoding import StaticSession, StaticVerifier, static_session
from .static_drafts import StaticCandidateGenerator
from .stats import GenerationStats
from .tree import CandidateTree
from .verification import on_device_of, walk
from .verifiers import TargetVerifier, Verifier


def speculative_decode(
    target: PreTrainedModel,
    draft: SparrowDraftModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> Any:
    """Decodes with a bound draft; the counterpart of transformers' plain loop, with the same inputs and outputs.

    Returns:
        The `(1, L + new)` ids, or a [`~transformers.generation.GenerateDecoderOnlyOutput`].

    Raises:
        UnsupportedGenerationError: An option of the call cannot be combined with a draft; nothing was computed yet.
    """
    # Checked again: `generate()` has made the cache since, and may have got the draft by another argument.
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    is_static = generation_config.cache_implementation == "static"
    check_inputs(target, input_ids, embeds, None if is_static else model_kwargs[CACHE], mask)
    emitter = TokenEmitter(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    recorded = recorded_outputs(generation_config)
    # Not `draft.target`, which a call with another target may replace.
    view = draft.bind(target)
    if not is_static:
        _decode(target, view, draft, emitter, recorded, generation_config, model_kwargs, None)
        cache = model_kwargs[CACHE]
    else:
        compiles = _transformers.compiles(target, model_kwargs[CACHE], generation_config)
        if compiles and not traces_steps():
            warnings.warn("torch before 2.11 cannot compile a draft's steps: they run as they are", stacklevel=2)
            compiles = False
        options = _transformers.compile_options(target, generation_config) if compiles else None
        with static_session(view, draft, generation_config.max_length, options) as session:
            model_kwargs[CACHE] = session.verification.empty_cache()
            _decode(target, view, draft, emitter, recorded, generation_config, model_kwargs, session)
            cache = session.copy_of_cache() if generation_config.return_dict_in_generate else None
    if streamer is not None:
        streamer.end()
    return returned(emitter, recorded, cache, generation_config)


def _decode(
    target: PreTrainedModel,
    view: TargetView,
    draft: SparrowDraftModel,
    emitter: TokenEmitter,
    recorded: dict[str, tuple[Any, ...]],
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    session: StaticSession | None,
) -> None:
    """Prefill and rounds until the emitter has finished; in fixed shapes with a session."""
    input_ids, mask = emitter.input_ids, model_kwargs.get("attention_mask")
    cache = model_kwargs[CACHE]
    outlives_call = _transformers.outlives_call(cache, generation_config)
    if session is None and not outlives_call:
        _transformers.grow_in_place(cache)
    clock = PhaseClock(draft.device)
    stats = GenerationStats(draft.config.tree_shape.num_draft_levels, clock)
    draft.last_generation = stats

    # Prefill. Only what is new to the target's cache passes the hooks.
    new = num_new_positions(input_ids, generation_config, model_kwargs)
    prompt = draft, input_ids[:, -new:].to(draft.device), None if mask is None else mask[:, -new:].to(draft.device)
    with clock.phase("draft"):
        if session is None:
            generator = SparrowCandidateGenerator(*prompt)
        else:
            generator = StaticCandidateGenerator(session.drafting, *prompt)
    ways = how_to_verify(view)
    if generator.shape.beam_width > 1 and ways.trees is None:
        generator.draft_chains()
        warnings.warn(
            f"the target's {ways.why_no_trees} cannot verify trees: the draft proposes chains of "
            f"{generator.shape.num_draft_levels} tokens instead",
            stacklevel=3,
        )
    with clock.phase("prefill"), HiddenStateCollector(generator.layers_to_collect).active() as collector:
        logits, first_position, model_kwargs = prefill(target, input_ids, generation_config, model_kwargs, recorded)
    first_token = emitter.choose(logits)
    stats.new_tokens = 1
    emitter.commit(first_token)
    del logits
    if not emitter.finished:
        with clock.phase("draft"):
            generator.prefill({layer: collector.take(layer) for layer in generator.layers_to_collect}, first_token)
    del collector

    verifier: Verifier
    if session is None:
        layer_ids, held = draft.config.feature_layer_ids, hold(model_kwargs[CACHE])
        verifier = TargetVerifier(view, ways, layer_ids, first_position, model_kwargs, held, recorded)
    else:
        verifier = StaticVerifier(session.verification, first_position, model_kwargs)
    try:
        with _transformers.decoding(target):
            while not emitter.finished:
                # A round commits at most one token more than it drafts.
                with clock.phase("draft"):
                    tree = generator.propose(max_levels=min(emitter.budget - 1, verifier.max_levels()))
                with clock.phase("verify"), verifier.verifying(tree) as (logits, path):
                    accept(tree, logits, emitter, stats, path)
                if not emitter.finished:
                    with clock.phase("draft"):
                        generator.extend(verifier.features(path), emitter.new_tokens[-len(path) :])
                stats.max_draft_cache_length = generator.max_cache_length
                stats.failed_drafts = generator.failed_drafts
    finally:
        with _transformers.decoding(target), clock.phase("verify"):
            verifier.close(outlives_call)
        # A logits processor may have called generate() with the draft itself.
        draft.last_generation = stats


def prefill(
    target: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    recorded: dict[str, tuple[Any, ...]],
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Runs the target over what its cache does not hold yet of the prompt.

    Returns:
        The `(B, V)` logits of the first generated token, its `(…, 1)` position, and what the next plain step is given.
    """
    outputs = _transformers.prefill(target, input_ids, generation_config, model_kwargs)
    # The encoded video is not used after the prefill, and its size grows with the video.
    model_kwargs.pop("mm_encoder_outputs", None)
    model_kwargs = on_device_of(outputs.logits, _transformers.advance(target, outputs, model_kwargs))
    for name in recorded:
        recorded[name] += (outputs[name],)
    return outputs.logits[:, -1], model_kwargs["position_ids"][..., -1:], model_kwargs


def recorded_outputs(generation_config: GenerationConfig) -> dict[str, tuple[Any, ...]]:
    """Outputs of every step that the call asks for, none yet."""
    wanted = {
        "hidden_states": generation_config.output_hidden_states,
        "attentions": generation_config.output_attentions,
    }
    return {name: () for name, is_wanted in wanted.items() if is_wanted and generation_config.return_dict_in_generate}


def returned(
    emitter: Any, recorded: dict[str, tuple[Any, ...]], cache: Any, generation_config: GenerationConfig
) -> Any:
    """What `generate()` returns: the ids, or all that was asked for."""
    if not generation_config.return_dict_in_generate:
        return emitter.input_ids
    return GenerateOutput(
        sequences=emitter.input_ids,
        scores=emitter.choice.scores,
        logits=emitter.choice.logits,
        attentions=recorded.get("attentions"),
        hidden_states=recorded.get("hidden_states"),
        **{CACHE: cache},
    )


def accept(
    tree: CandidateTree, logits: Tensor, emitter: TokenEmitter, stats: GenerationStats, path: list[int]
) -> None:
    """One round: walks the tree with the target's `(1, N, V)` logits, committing tokens; `path` gets their nodes."""
    # Read from the device at once.
    argmax = likeliest(logits).tolist()[0] if emitter.choice.is_argmax else None
    of_node = logits.unbind(1)

    def choose(node: int) -> int:
        return emitter.choose(of_node[node], None if argmax is None else argmax[node])

    def commit(token: int, drafted: bool) -> bool:
        # Counted before the token is streamed, so that a streamer can distinguish drafted tokens from others.
        stats.accepted[-1] += drafted
        stats.new_tokens += 1
        emitter.commit(token)
        return emitter.finished

    stats.accepted.append(0)
    walk(tree, choose, commit, path)


def num_new_positions(input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> int:
    """Prompt positions the prefill will compute: all, or those a cache passed in by the caller does not hold yet.

    With a cache, `input_ids` is the full sequence exactly if it is as long as the attention mask, as in transformers.
    """
    full_length = _transformers.length_with_cache(generation_config, model_kwargs.get("attention_mask"))
    is_full = full_length == input_ids.shape[1]
    return input_ids.shape[1] - (model_kwargs[CACHE].get_seq_length() if is_full else 0)
