"""`generate(assistant_model=draft)` equals plain `generate()` on every family, attention, shape and way to draft."""

import functools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE

from families import FAMILIES, FAMILY_BY_NAME
from oracles import drafting_around
from tiny_targets import Family

MAX_NEW_TOKENS = 24

#: Drafts of both kinds, unlike in what else a draft can be configured to do.
DRAFTS: dict[str, dict[str, Any]] = {
    "chain": {"num_tree_nodes": 6, "num_draft_levels": 5, "beam_width": 1, "num_glimpse_tokens": 3},
    "tree": {
        "num_tree_nodes": 14,
        "num_draft_levels": 4,
        "beam_width": 3,
        "num_glimpse_tokens": 0,
        "position_mode": "original",
    },
}
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    # Two processors that read the current scores only, and one that reads the history.
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2},
}


@functools.cache
def built_target(name: str, attn_implementation: str) -> PreTrainedModel:
    """Targets are shared by the tests, so a call must not change one."""
    return FAMILY_BY_NAME[name].build_target(attn_implementation)


def new_tokens(
    target: PreTrainedModel, inputs: dict[str, Any], draft: SparrowDraftModel | None = None, **kwargs: Any
) -> list[int]:
    torch.manual_seed(7)
    options = {"max_new_tokens": MAX_NEW_TOKENS} | kwargs
    sequences = target.generate(**inputs, assistant_model=draft, **options)
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


@functools.cache
def plain_tokens(name: str, attn_implementation: str, decoding: str) -> list[int]:
    target = built_target(name, attn_implementation)
    return new_tokens(target, FAMILY_BY_NAME[name].build_inputs(target), **DECODING[decoding])


def random_draft(target: PreTrainedModel, kind: str) -> SparrowDraftModel:
    torch.manual_seed(11)
    return SparrowDraftModel.from_target(target, **DRAFTS[kind])


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
class TestEqualsPlainGenerate:
    def test_random_draft(self, family: Family, attn_implementation: str, kind: str, decoding: str) -> None:
        target = built_target(family.name, attn_implementation)
        draft = random_draft(target, kind)
        # Nearly one token per round: half the text is enough.
        tokens = new_tokens(
            target, family.build_inputs(target), draft, **DECODING[decoding], max_new_tokens=MAX_NEW_TOKENS // 2
        )
        assert tokens == plain_tokens(family.name, attn_implementation, decoding)[: MAX_NEW_TOKENS // 2]
        assert draft.last_generation.new_tokens == len(tokens)

    def test_oracle(self, family: Family, attn_implementation: str, kind: str, decoding: str) -> None:
        target = built_target(family.name, attn_implementation)
        draft = random_draft(target, kind)
        plain = plain_tokens(family.name, attn_implementation, decoding)
        with drafting_around(plain, adversarial=False):
            tokens = new_tokens(target, family.build_inputs(target), draft, **DECODING[decoding])
        assert tokens == plain
        # All rounds but the last are accepted in full, except where the text holds a placeholder.
        stats = draft.last_generation
        placeholders = sum(token in family.visual_token_ids for token in plain)
        assert sum(accepted < stats.num_draft_levels for accepted in stats.accepted[:-1]) <= placeholders

    def test_adversary(self, family: Family, attn_implementation: str, kind: str, decoding: str) -> None:
        target = built_target(family.name, attn_implementation)
        draft = random_draft(target, kind)
        plain = plain_tokens(family.name, attn_implementation, decoding)
        accepted: set[int] = set()
        for seed in range(2):
            with drafting_around(plain, adversarial=True, seed=seed):
                assert new_tokens(target, family.build_inputs(target), draft, **DECODING[decoding]) == plain
            accepted.update(draft.last_generation.accepted)
        # Paths of many lengths were walked, else this proves nothing.
        assert len(accepted) >= 3


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"videos": 2}, id="two-videos"),
        pytest.param({"videos": 1, "images": 1}, id="video-and-image"),
        pytest.param({"videos": 0, "images": 2}, id="two-images"),
        pytest.param({"videos": 0}, id="text"),
        pytest.param({"num_frames": 9}, id="nine-frames"),
    ],
)
def test_equals_plain_generate_on_other_prompts(family: Family, variant: dict[str, int], kind: str) -> None:
    if variant.get("videos") and variant.get("images") and not family.mixes_modalities:
        pytest.skip(f"the processor of {family.name} takes images or videos, not both")
    target = built_target(family.name, "sdpa")
    inputs = family.build_inputs(target, **variant)
    plain = new_tokens(target, inputs, do_sample=False)
    draft = random_draft(target, kind)
    with drafting_around(plain, adversarial=True, seed=3):
        assert new_tokens(target, inputs, draft, do_sample=False) == plain
    assert max(draft.last_generation.accepted) > 0


@pytest.mark.parametrize("kind", DRAFTS)
def test_equals_plain_generate_with_left_padding(family: Family, kind: str) -> None:
    target = built_target(family.name, "sdpa")
    inputs = family.build_inputs(target)
    padding = torch.zeros((1, 7), dtype=torch.long)
    for name, value in (("input_ids", family.tokenizer.pad_token_id), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.cat((padding + value, inputs[name]), dim=1)
    plain = new_tokens(target, inputs, do_sample=False)
    assert plain == plain_tokens(family.name, "sdpa", "greedy")
    draft = random_draft(target, kind)
    with drafting_around(plain, adversarial=True, seed=5):
        assert new_tokens(target, inputs, draft, do_sample=False) == plain
    assert max(draft.last_generation.accepted) > 0


@pytest.mark.parametrize("kind", DRAFTS)
def test_equals_plain_generate_in_the_second_turn(family: Family, kind: str) -> None:
    target = built_target(family.name, "sdpa")
    inputs = family.build_inputs(target)
    draft = random_draft(target, kind)

    def first_turn(assistant: SparrowDraftModel | None) -> GenerateDecoderOnlyOutput:
        return target.generate(
            **inputs, assistant_model=assistant, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )

    plain_turn, turn = first_turn(None), first_turn(draft)
    assert torch.equal(turn.sequences, plain_turn.sequences)
    follow_up = family.tokenizer("\nUser: And then?\nAssistant:", return_tensors="pt")["input_ids"]
    input_ids = torch.cat((turn.sequences, follow_up), dim=1)
    second = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    plain = new_tokens(target, second | {CACHE: plain_turn[CACHE]}, do_sample=False)
    with drafting_around(plain, adversarial=True, seed=9):
        tokens = new_tokens(target, second | {CACHE: turn[CACHE]}, draft, do_sample=False)
    assert tokens == plain
    assert max(draft.last_generation.accepted) > 0


def test_a_call_leaves_the_target_as_it_was() -> None:
    """Last in the file: every call above used these targets."""
    for family in FAMILIES:
        used, fresh = built_target(family.name, "sdpa"), family.build_target("sdpa")
        assert new_tokens(used, family.build_inputs(used), do_sample=False) == plain_tokens(
            family.name, "sdpa", "greedy"
        )
        assert used.config.to_dict() == fresh.config.to_dict()
        for (name, tensor), (_, original) in zip(used.state_dict().items(), fresh.state_dict().items(), strict=True):
            assert torch.equal(tensor, original), name
