"""Runs plain `generate()` and its rivals on the same inputs in the same process, all timed by one instrument.

The instrument is a streamer: `generate()` hands it the prompt, then tokens as they are committed. What lies before the
first token counts as prefill (the video encoder included), what lies after it as decoding, in every arm alike. A
forward hook on the target counts its forwards.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration_sparrow import TREE_PRESETS, TreeShape, check_tree_shape
from ..errors import DraftConfigError
from ..generation.stopwatch import StopWatch
from ..modeling_sparrow import SparrowDraftModel
from .metrics import Run

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Arm:
    """One way to generate. Without a draft and without prompt lookup it is plain `generate()`.

    Attributes:
        name: What tables call it.
        draft: A Sparrow draft of the target.
        tree: The tree the draft grows; its configured one by default.
        prompt_lookup_num_tokens: Most tokens per round that transformers' prompt lookup copies from the context.
    """

    name: str
    draft: SparrowDraftModel | None = None
    tree: TreeShape | None = None
    prompt_lookup_num_tokens: int | None = None

    @property
    def num_draft_levels(self) -> int:
        """Most draft tokens a round can accept."""
        if self.draft is None:
            return self.prompt_lookup_num_tokens or 0
        return (self.tree or self.draft.config.tree_shape).num_draft_levels

    @contextmanager
    def options(self) -> Iterator[dict[str, Any]]:
        """Arguments this arm adds to `generate()`; the draft has the arm's tree inside."""
        if self.draft is None:
            lookup = self.prompt_lookup_num_tokens
            yield {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
            return
        config = self.draft.config
        configured = config.tree_shape
        config.set_tree_shape(self.tree or configured)
        try:
            yield {"assistant_model": self.draft}
        finally:
            config.set_tree_shape(configured)


def measure(
    target: PreTrainedModel, arm: Arm, inputs: Mapping[str, Tensor], settings: Mapping[str, Any], seed: int = 0
) -> tuple[Run, list[int]]:
    """One timed `generate()` call.

    Args:
        inputs: What the processor returned.
        settings: Further arguments of `generate()`, the same for every arm.
        seed: Of torch's global generator, for sampling.

    Returns:
        The measurement, and the generated tokens.
    """
    torch.manual_seed(seed)
    with arm.options() as options, StopWatch(target) as watch:
        target.generate(**inputs, **settings, **options, streamer=watch)
    run = Run(
        new_tokens=len(watch.tokens),
        decode_tokens=sum(watch.chunks[1:]),
        rounds=watch.rounds,
        # Whoever streams whole rounds at once (transformers' own loop) tells with them what was accepted.
        accepted=[chunk - 1 for chunk in watch.chunks[1:]],
        num_draft_levels=arm.num_draft_levels,
        prefill_seconds=watch.prefill_seconds,
        decode_seconds=watch.decode_seconds,
    )
    stats = None if arm.draft is None else arm.draft.last_generation
    if stats is not None:
        run = dataclasses.replace(
            run,
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
) -> dict[str, Run]:
    """Measures every arm once on one prompt.

    Args:
        arms: The first one is the reference whose tokens all others must give.
        turn: Which arm begins, counted modulo their number. Raise it by one per call, so that no arm is always the one
            that runs first, or right after a slow one.

    Returns:
        Arm name → measurement.
    """
    first = turn % len(arms)
    measured = {arm.name: measure(target, arm, inputs, settings, seed) for arm in (*arms[first:], *arms[:first])}
    reference = measured[arms[0].name][1]
    return {
        arm.name: dataclasses.replace(run, differs_at=first_difference(reference, tokens))
        for arm in arms
        for run, tokens in [measured[arm.name]]
    }


def warm_up(
    target: PreTrainedModel, arms: Sequence[Arm], inputs: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Runs every arm for a few tokens, so that no measurement pays for what is only done once."""
    for arm in arms:
        measure(target, arm, inputs, {**settings, "max_new_tokens": WARM_UP_TOKENS})


def first_difference(reference: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Index of the first token that differs, a missing or surplus one included; `None` if both are the same."""
    for index, (expected, found) in enumerate(zip(reference, tokens, strict=False)):
        if expected != found:
            return index
    return None if len(reference) == len(tokens) else min(len(reference), len(tokens))


def parse_tree(text: str) -> TreeShape:
    """A tree shape from the name of a preset, `chain-LEVELS`, or `NODES-LEVELS-BEAM`.

    Raises:
        DraftConfigError: It is none of these, or no such tree can be grown.
    """
    if text in TREE_PRESETS:
        return TREE_PRESETS[text]
    if chain := re.fullmatch(r"chain-(\d+)", text):
        shape = TreeShape(int(chain[1]) + 1, int(chain[1]), 1)
    elif sizes := re.fullmatch(r"(\d+)-(\d+)-(\d+)", text):
        shape = TreeShape(int(sizes[1]), int(sizes[2]), int(sizes[3]))
    else:
        raise DraftConfigError(
            f"unknown tree {text!r}: give one of {', '.join(TREE_PRESETS)}, chain-LEVELS, or NODES-LEVELS-BEAM "
            "such as 40-5-8"
        )
    check_tree_shape(shape)
    return shape
