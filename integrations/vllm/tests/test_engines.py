"""In vLLM, with the draft: the texts of vLLM without it, the acceptance of transformers. Planted faults are seen."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engines import STATE_TOLERANCE, Engine, Family, check, draft_states, engine, others


@pytest.fixture(scope="module")
def drafting(qwen: Family, plain: list[list[int]]) -> Iterator[Engine]:
    """With the draft; a prompt is read as a whole. One engine lives at a time, so `plain` is there before."""
    with engine(qwen) as with_draft:
        yield with_draft


@pytest.mark.parametrize("visual_tokens", (400, 3200))
def test_whole_prompts(qwen: Family, drafting: Engine, visual_tokens: int) -> None:
    drafting.forget()
    clips = qwen.of_length(visual_tokens)
    check(drafting.answer([qwen.request(clip) for clip in clips], at_once=False), clips, "vllm")


def test_cached_prefixes(qwen: Family, drafting: Engine) -> None:
    """The same prompts again: all of their full blocks but the last are cached."""
    requests = [qwen.request(clip) for clip in qwen.clips]
    drafting.answer(requests)
    before = cached(drafting)
    answers = drafting.answer(requests, at_once=False)
    check(answers, qwen.clips, "vllm")
    assert cached(drafting) - before > 0.7 * sum(len(clip["prompt_ids"]) for clip in qwen.clips)


def cached(drafting: Engine) -> int:
    """Tokens that were found in the prefix cache so far."""
    return sum(metric.value for metric in drafting.llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")


def test_eight_requests_at_once(qwen: Family, drafting: Engine) -> None:
    drafting.forget()
    clips = qwen.clips[::-1]
    check(drafting.answer([qwen.request(clip) for clip in clips]), clips, "vllm")


def test_other_prompts(qwen: Family, drafting: Engine, plain: list[list[int]]) -> None:
    for at_once in (False, True):
        assert drafting.answer(others(qwen), at_once=at_once).ids == plain


# -- planted faults ---------------------------------------------------------------------------------------------------


def with_rows(**changes: Any) -> Any:
    """The plugin with another `describe`: field → what becomes of it, given the rows and the next ids."""
    from sparrow_vllm import model

    own = model.describe

    def describe(batch: Any, next_ids: torch.Tensor, *arguments: Any) -> Any:
        rows = own(batch, next_ids, *arguments)
        return replace(rows, **{name: change(rows, next_ids) for name, change in changes.items()})

    return patch.object(model, "describe", describe)


def reads_the_last_layer() -> Any:
    from sparrow_vllm.model import SparrowDraft

    own = SparrowDraft.combine_hidden_states

    def combine(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        combined = own(self, hidden_states)
        self.bridge[: len(combined)] = combined
        return combined

    return patch.object(SparrowDraft, "combine_hidden_states", combine)


def leaves_the_slots() -> Any:
    from sparrow_vllm import seams

    return patch.object(seams, "put_slots", lambda name, slots: None)


def test_the_draft_computes_what_it_does_in_transformers(qwen: Family, drafting: Engine) -> None:
    states = draft_states(qwen, drafting, qwen.clips)
    for clip, of_clip in zip(qwen.clips, states, strict=True):
        print(f"{clip['name']}: {float((of_clip - torch.tensor(clip['states'])).abs().max()):.1e}")
        torch.testing.assert_close(of_clip, torch.tensor(clip["states"]), rtol=0, atol=STATE_TOLERANCE)


FAULTS = {
    "nothing hidden": lambda: with_rows(hidden=lambda rows, _: torch.zeros_like(rows.hidden)),
    "no shift over the video": lambda: with_rows(next_ids=lambda _, next_ids: next_ids),
    "positions of the prompt": lambda: with_rows(positions=lambda rows, _: torch.arange(len(rows.positions))),
    "visual states of the last layer": reads_the_last_layer,
    "slots of the runner": leaves_the_slots,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_in_the_states_and_not_in_the_text(qwen: Family, drafting: Engine, fault: str) -> None:
    clip = qwen.of_length(400)[0]
    with FAULTS[fault]():
        (states,) = draft_states(qwen, drafting, [clip])
        answers = drafting.answer([qwen.request(clip) for clip in qwen.of_length(400)], at_once=False)
    drafting.forget()
    differences = (states - torch.tensor(clip["states"])).abs().amax(-1)
    print(f"{fault}: {', '.join(f'{float(each):.1e}' for each in differences)};", end=" ")
    print(f"acceptance length {answers.acceptance_length:.2f}")
    assert differences.max() > 3 * STATE_TOLERANCE
    assert answers.ids == [clip["vllm"]["ids"] for clip in qwen.of_length(400)]
