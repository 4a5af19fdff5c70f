"""Committing tokens: what criteria, processors and streamers are given, and rules that are read without the device."""

from typing import Any

import pytest
import torch
from greedy import greedy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer, EosTokenCriteria, LogitsProcessor, MaxTimeCriteria, StoppingCriteria

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import UnsupportedGenerationError
from sparrow_hf.generation.emission import TokenEmitter
from sparrow_hf.generation.stop_rules import stop_rules

from batches import batch_of
from batches import drafting_around as drafting_batches_around
from families import FAMILY_BY_NAME
from oracles import drafting_around


@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    max_length=st.integers(1, 12),
    ends=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=2),
)
def test_rules_say_what_the_criteria_say(tokens: list[int], max_length: int, ends: list[list[int]]) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length), *map(EosTokenCriteria, ends)])
    rules = stop_rules(criteria)
    assert rules is not None
    for length in range(1, len(tokens) + 1):
        expected = bool(criteria(torch.tensor([tokens[:length]]), None).all())
        assert rules.stop(tokens[length - 1], length) == expected


class Never(MaxLengthCriteria):
    """A subclass may do anything."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


class AnyList(StoppingCriteriaList):
    """So may a list."""


@pytest.mark.parametrize(
    "criteria",
    [
        StoppingCriteriaList([MaxLengthCriteria(9), MaxTimeCriteria(1.0)]),
        StoppingCriteriaList([Never(9)]),
        AnyList([MaxLengthCriteria(9)]),
        # Warns once the text is longer.
        StoppingCriteriaList([MaxLengthCriteria(9, max_position_embeddings=8)]),
    ],
)
def test_other_criteria_are_asked_themselves(criteria: StoppingCriteriaList) -> None:
    assert stop_rules(criteria) is None


def test_rules_of_several_criteria_are_the_strictest() -> None:
    criteria = [MaxLengthCriteria(9, max_position_embeddings=9), MaxLengthCriteria(7), EosTokenCriteria(3)]
    rules = stop_rules(StoppingCriteriaList(criteria))
    assert rules is not None and (rules.max_length, rules.ends) == (7, {3})
    assert not rules.stop(4, 6) and rules.stop(4, 7) and rules.stop(3, 6)


@pytest.mark.parametrize("beyond", [-3, 3, 20])
@pytest.mark.parametrize("options", [{}, {"return_dict_in_generate": True}], ids=["own pace", "in step"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_length_of_the_users_own_takes_the_place_of_the_options(
    rows: int, options: dict[str, Any], beyond: int
) -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3)
    ids = torch.arange(20, 60).view(2, 20)[:rows]
    criteria = StoppingCriteriaList([MaxLengthCriteria(26 + beyond)])
    call = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "stopping_criteria": criteria, **options}
    plain = target.generate(ids, **call)
    sequences = plain["sequences"] if options else plain
    assert sequences.shape[1] == 26 + beyond
    texts = sequences[:, 20:].tolist()
    with drafting_around(texts[0], adversarial=False), drafting_batches_around(texts, adversarial=False):
        ours = target.generate(ids, **call, assistant_model=draft)
    assert torch.equal(ours["sequences"] if options else ours, sequences)
    # It goes on drafting.
    assert draft.last_generation.rounds == rows * -(-(6 + beyond - 1) // 4)


def test_a_length_beyond_the_buffers_is_refused() -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    draft, ids = SparrowDraftModel.from_target(target), torch.arange(20, 40)[None]
    options = {"assistant_model": draft, "cache_implementation": "static", "max_new_tokens": 6}
    criteria = StoppingCriteriaList([MaxLengthCriteria(27)])
    with pytest.raises(UnsupportedGenerationError, match="room for max_length=26 tokens, found .* of 27: raise"):
        target.generate(ids, **options, stopping_criteria=criteria)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_end_may_be_a_number_alone(rows: int) -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3)
    ids = torch.arange(20, 60).view(2, 20)[:rows]
    end = target.generate(ids, **greedy(6))[0, -1]
    call = {**greedy(12), "min_new_tokens": None, "stopping_criteria": [EosTokenCriteria(end)], "pad_token_id": 0}
    assert torch.equal(target.generate(ids, **call, assistant_model=draft), target.generate(ids, **call))


def test_ids_are_put_together_when_they_are_read() -> None:
    prompt = torch.tensor([[5, 6]], dtype=torch.int32)
    emitter = TokenEmitter(prompt, LogitsProcessorList(), StoppingCriteriaList([]), GenerationConfig(), None)
    assert emitter.input_ids is prompt
    emitter.commit(7)
    emitter.commit(8)
    first = emitter.input_ids
    assert first.tolist() == [[5, 6, 7, 8]] and first.dtype == torch.int64 and emitter.input_ids is first
    emitter.commit(9)
    assert (emitter.length, emitter.new_tokens) == (5, [7, 8, 9])
    assert emitter.input_ids.tolist() == [[5, 6, 7, 8, 9]] and first.tolist() == [[5, 6, 7, 8]]


class Keeps:
    """Keeps every tensor of ids that it is given."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class KeepingProcessor(Keeps, LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.kept.append(input_ids)
        return scores


class KeepingCriterion(Keeps, StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.kept.append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class KeepingStreamer(Keeps, BaseStreamer):
    def put(self, value: Tensor) -> None:
        self.kept.append(value)

    def end(self) -> None:
        self.kept.append(torch.tensor(-1))


def described(keeper: Keeps) -> list[tuple[torch.Size, torch.dtype, torch.device, Any]]:
    return [(ids.shape, ids.dtype, ids.device, ids.tolist()) for ids in keeper.kept]


# The positions of Qwen2.5-VL admit no other ids than int64.
@pytest.mark.parametrize(("name", "dtype"), [("qwen2_5_vl", torch.int64), ("llava_onevision", torch.int32)])
def test_what_is_given_away_stays_what_it_was(name: str, dtype: torch.dtype) -> None:
    family = FAMILY_BY_NAME[name]
    target = family.build_target()
    inputs, text = family.build_inputs(target), []
    inputs["input_ids"] = inputs["input_ids"].to(dtype)
    draft = SparrowDraftModel.from_target(target, num_tree_nodes=12, num_draft_levels=3, beam_width=3)

    def kept(draft: SparrowDraftModel | None) -> list[list[tuple[torch.Size, torch.dtype, torch.device, Any]]]:
        processor, criterion, streamer = KeepingProcessor(), KeepingCriterion(), KeepingStreamer()
        output = target.generate(
            **inputs,
            **greedy(12),
            assistant_model=draft,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
            streamer=streamer,
        )
        text[:] = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert output.dtype == torch.int64
        return [described(each) for each in (processor, criterion, streamer)]

    plain = kept(None)
    assert list(map(len, plain)) == [12, 12, 1 + 12 + 1]
    with drafting_around(text.copy(), adversarial=True, seed=1):
        assert kept(draft) == plain
    assert max(draft.last_generation.accepted) > 1


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_what_a_batch_gives_away_is_plains(dtype: torch.dtype, in_step: bool) -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3)
    inputs = batch_of(family, target, [{"videos": 0}, {"videos": 0, "question": "Who?"}])
    inputs["input_ids"] = inputs["input_ids"].to(dtype)
    length, texts = inputs["input_ids"].shape[1], []

    def kept(draft: SparrowDraftModel | None) -> list[Any]:
        processor, criterion, streamer = KeepingProcessor(), KeepingCriterion(), KeepingStreamer()
        output = target.generate(
            **inputs,
            **greedy(12),
            assistant_model=draft,
            # A processor of the user's own may look at other rows, so it ties them.
            logits_processor=LogitsProcessorList([processor] if in_step else []),
            stopping_criteria=StoppingCriteriaList([criterion]),
            streamer=streamer,
        )
        texts[:] = output[:, length:].tolist()
        return [output.dtype, *map(described, (processor, criterion, streamer))]

    plain = kept(None)
    assert plain[0] == torch.int64 and list(map(len, plain[1:])) == [12 * in_step, 12, 1 + 12 + 1]
    with drafting_batches_around(texts.copy(), adversarial=True, seed=1):
        assert kept(draft) == plain
    assert max(draft.last_generation.accepted) > 1
