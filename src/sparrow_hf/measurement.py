"""Measures several arms (ways of generating) on the same inputs in the same process, with the same clock.

Benchmarks, the demo and the decoded evaluation of a training all measure here. The clock is a streamer:
`generate()` passes it the prompt, then tokens as they are committed. The time before the first token counts as prefill
(video encoder included) and the time after it as decoding, in every arm. A forward hook on the target counts forwards.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from ._transformers import attention_of, compile_config
from .clocks import StopWatch
from .configuration_sparrow import TreeShape
from .metrics import Run, count_asked
from .modeling_sparrow import SparrowDraftModel
from .prefill import PrefillSnapshot

PLAIN, NO_DRAFT = "plain", "none"
"""Names of two arms that are the same everywhere: `generate()` as it is, and our loop without a draft."""

WARM_UP_TOKENS = 8
#: Tokens per round that transformers asks an assistant model for, unless its generation config says otherwise.
ASSISTANT_TOKENS = 20


@dataclass(frozen=True)
class Arm:
    """One way to generate. Without a draft, an assistant and prompt lookup it is plain `generate()`.

    Attributes:
        name: Its name in tables.
        draft: A Sparrow draft of the target.
        tree: The tree the draft grows; its configured one by default.
        num_glimpse_tokens: Visual tokens that the draft reads; its configured number by default.
        prompt_lookup_num_tokens: Maximum number of tokens per round that transformers' prompt lookup copies.
        assistant: A small model of the target's own kind, run by transformers' assisted generation.
        attention: Attention implementation that the target's decoder runs on meanwhile; its own by default.
        is_compiled: Decode with a static cache and compiled forwards: `cache_implementation="static"`.
    """

    name: str
    draft: SparrowDraftModel | None = None
    tree: TreeShape | None = None
    num_glimpse_tokens: int | None = None
    prompt_lookup_num_tokens: int | None = None
    assistant: PreTrainedModel | None = None
    attention: str | None = None
    is_compiled: bool = False

    @property
    def num_draft_levels(self) -> int:
        """Most draft tokens a round can accept."""
        if self.draft is not None:
            return (self.tree or self.draft.config.tree_shape).num_draft_levels
        if self.assistant is not None:
            return self.assistant.generation_config.num_assistant_tokens or ASSISTANT_TOKENS
        return self.prompt_lookup_num_tokens or 0

    @property
    def runs_stock_loop(self) -> bool:
        """Whether transformers' own assisted loop does the decoding."""
        return self.prompt_lookup_num_tokens is not None or self.assistant is not None

    @property
    def runs_own_prefill(self) -> bool:
        """Whether it cannot start from a shared prefill, whose cache is a dynamic one of plain `generate()`."""
        return self.runs_stock_loop or self.is_compiled

    @property
    def layers_read(self) -> set[int]:
        """Layers of the target whose states the draft reads from the prefill."""
        return set() if self.draft is None else self.draft.config.layer_ids_read

    @contextmanager
    def prepared(self, target: PreTrainedModel) -> Iterator[dict[str, Any]]:
        """How the target runs in this arm: its attention inside, and the arguments of `generate()` that compile it.

        Raises:
            ValueError: The target cannot run on such an attention.
        """
        arguments: dict[str, Any] = {}
        if self.is_compiled:
            arguments = {"cache_implementation": "static", "compile_config": compile_config()}
        if self.attention is None:
            yield arguments
            return
        # The video encoder keeps its own.
        decoder = target.get_decoder()
        own = attention_of(decoder.config)
        decoder.set_attn_implementation(self.attention)
        try:
            yield arguments
        finally:
            decoder.set_attn_implementation(own)

    @contextmanager
    def options(self, target: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Arguments this arm adds to `target.generate(**inputs)`; the draft has the arm's tree and glimpse inside."""
        if self.draft is None:
            named = {
                "prompt_lookup_num_tokens": self.prompt_lookup_num_tokens,
                "assistant_model": self.assistant,
            }
            yield {name: value for name, value in named.items() if value is not None}
            return
        config = self.draft.config
        configured, glimpse = config.tree_shape, config.num_glimpse_tokens
        config.set_tree_shape(self.tree or configured)
        if self.num_glimpse_tokens is not None:
            config.num_glimpse_tokens = self.num_glimpse_tokens
        try:
            yield {"assistant_model": self.draft}
        finally:
            config.set_tree_shape(configured)
            config.num_glimpse_tokens = glimpse


def measure(
    target: PreTrainedModel,
    arm: Arm,
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    seed: int = 0,
    prefill: PrefillSnapshot | None = None,
    streamer: BaseStreamer | None = None,
) -> tuple[Run, list[int]]:
    """One timed `generate()` call.

    Args:
        inputs: What the processor returned.
        settings: Further arguments of `generate()`, the same for every arm.
        seed: Seed of torch's global generator, for sampling.
        prefill: The prefill of these inputs, computed before. The call starts from a copy, and the time of that
            prefill is added to its own. Arms that run transformers' own loop, or are compiled, run their own prefill.
        streamer: Shows the text while it is written; what it does counts as time of the call.

    Returns:
        The measurement, and the generated tokens.
    """
    torch.manual_seed(seed)
    is_replayed = prefill is not None and not arm.runs_own_prefill
    memory_before = _start_counting_memory(target)
    with ExitStack() as stack:
        options = stack.enter_context(arm.prepared(target)) | stack.enter_context(arm.options(target, inputs))
        if prefill is not None and is_replayed:
            inputs = stack.enter_context(prefill.replayed())
        watch = stack.enter_context(StopWatch(target, streamer))
        target.generate(**inputs, **settings, **options, streamer=watch)
    run = Run(
        new_tokens=len(watch.tokens),
        decode_tokens=sum(watch.chunks[1:]),
        # Plain decoding streams every token, transformers' assisted loop every round.
        rounds=len(watch.chunks[1:]),
        # transformers' own loop streams a whole round at once, which shows how many tokens were accepted.
        accepted=[chunk - 1 for chunk in watch.chunks[1:]],
        num_draft_levels=arm.num_draft_levels,
        prefill_seconds=prefill.seconds if prefill is not None and is_replayed else watch.prefill_seconds,
        decode_seconds=watch.decode_seconds,
        peak_bytes=None if memory_before is None else torch.cuda.max_memory_allocated(target.device) - memory_before,
    )
    stats = None if arm.draft is None else arm.draft.last_generation
    if stats is not None:
        run = dataclasses.replace(
            run,
            rounds=stats.rounds,
            accepted=list(stats.accepted),
            draft_seconds=stats.draft_seconds,
            verify_seconds=stats.verify_seconds,
            draft_cache_rows=stats.max_draft_cache_length,
        )
    return run, watch.tokens


def compare(
    target: PreTrainedModel,
    arms: Sequence[Arm],
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    turn: int = 0,
    seed: int = 0,
    *,
    repeats: int = 1,
    shared_prefill: bool = False,
    prefill: PrefillSnapshot | None = None,
    is_content: Callable[[int], bool] | None = None,
) -> dict[str, Run]:
    """Measures every arm on one prompt.

    A compiled arm makes an untimed call first, since every length may have to be compiled.

    Args:
        arms: The first one is the reference whose tokens all others must give.
        turn: Seed of the order in which the arms run. Use another number for every call, so that no arm always runs
            first or after the same arm.
        repeats: How often every arm runs, each time in a new order. The call with the median decode time is kept (of
            an even number, the faster of the two in the middle). An arm differs from the reference if any of its
            calls does. [`num_rounds`] says how often each arm takes part.
        shared_prefill: Compute the prompt once, and let every arm start from a copy (see [`PrefillSnapshot`]).
        prefill: Such a prefill, if it was computed before.
        is_content: Whether a token id belongs to a content word; fills [`Run`]'s `asked` for arms with a draft.

    Returns:
        Arm name → measurement.
    """
    if prefill is None and shared_prefill:
        prefill = prefill_once(target, arms, inputs, settings)
    first_seconds = {
        arm.name: measure(target, arm, inputs, settings, seed)[0].seconds for arm in arms if arm.is_compiled
    }
    calls: dict[str, list[tuple[Run, list[int]]]] = {arm.name: [] for arm in arms}
    for round_ in range(repeats):
        for arm in random.Random(turn * repeats + round_).sample(arms, len(arms)):
            if round_ < num_rounds(arm, repeats, prefill is not None):
                calls[arm.name].append(measure(target, arm, inputs, settings, seed, prefill))
    reference = _median_call(calls[arms[0].name])[1]
    runs = {}
    for arm in arms:
        run, tokens = _median_call(calls[arm.name])
        differences = [first_difference(reference, found) for _, found in calls[arm.name]]
        asked = None
        if is_content is not None and arm.draft is not None:
            asked = count_asked(tokens, run.accepted, run.num_draft_levels, settings["max_new_tokens"], is_content)
        differs_at = min((index for index in differences if index is not None), default=None)
        runs[arm.name] = dataclasses.replace(
            run, differs_at=differs_at, asked=asked, first_call_seconds=first_seconds.get(arm.name)
        )
    return runs


def num_rounds(arm: Arm, repeats: int, shared_prefill: bool) -> int:
    """How many of the repeats an arm takes part in.

    An arm that cannot start from a shared prefill takes part in the first only, because at 25,000 visual tokens its
    prefill takes longer than ten other arms.
    """
    return 1 if shared_prefill and arm.runs_own_prefill else repeats


def _median_call(calls: Sequence[tuple[Run, list[int]]]) -> tuple[Run, list[int]]:
    """The call whose decoding took the (lower) median time."""
    return sorted(calls, key=lambda call: call[0].decode_seconds)[(len(calls) - 1) // 2]


def _start_counting_memory(target: PreTrainedModel) -> int | None:
    """Bytes allocated on the target's GPU now, its peak counted anew from here; `None` on a CPU."""
    if target.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(target.device)
    return torch.cuda.memory_allocated(target.device)


def warm_up(
    target: PreTrainedModel,
    arms: Sequence[Arm],
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    shared_prefill: bool = False,
) -> None:
    """Runs every arm for a few tokens, so that no measurement includes work that is done only once.

    Compiled arms are left out: what is compiled depends on the length, and [`compare`] sees to it.

    Args:
        shared_prefill: As in [`compare`].
    """
    settings = {**settings, "max_new_tokens": WARM_UP_TOKENS}
    prefill = prefill_once(target, arms, inputs, settings) if shared_prefill else None
    for arm in arms:
        if not arm.is_compiled:
            measure(target, arm, inputs, settings, prefill=prefill)


def prefill_once(
    target: PreTrainedModel, arms: Sequence[Arm], inputs: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> PrefillSnapshot:
    """A prefill that holds what all arms need."""
    return PrefillSnapshot(target, inputs, settings, set().union(*(arm.layers_read for arm in arms)))


def is_exact(dtype: str) -> bool:
    """Whether a text in this dtype, such as `"float32"`, must be plain `generate()`'s, token for token.

    In bf16 and fp16 a forward over several tokens rounds differently from a forward over one, which may swap two
    nearly equal tokens: there a difference is told, but no fault.
    """
    return dtype in ("float32", "float64")


def first_difference(reference: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Index of the first token that differs, a missing or surplus one included; `None` if both are the same."""
    for index, (expected, found) in enumerate(zip(reference, tokens, strict=False)):
        if expected != found:
            return index
    return None if len(reference) == len(tokens) else min(len(reference), len(tokens))
