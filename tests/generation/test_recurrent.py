"""Targets with recurrent layers (Qwen3.5): a rejected draft leaves no trace in their states, no token is lost."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from recurrent_families import RECURRENT_FAMILIES
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE, cache_tensors, recurrent_states
from sparrow_hf.generation import caches, decoding, verifiers
from sparrow_hf.measurement import Arm, compare, first_difference
from sparrow_hf.prefill import PrefillSnapshot

import lossless
from families import FAMILY_BY_NAME
from lossless import Case, make_case, mismatch
from oracles import drafting_around

NAMES = [family.name for family in RECURRENT_FAMILIES]
BUDGETS = (0, 2, 1000)
QUESTION = torch.tensor([[20, 21, 22, 23]])
pytestmark = pytest.mark.filterwarnings("ignore:.* cannot verify trees")
Setting = tuple[PreTrainedModel, dict[str, Any], Tensor]


@pytest.fixture(scope="module", params=NAMES)
def setting(request: pytest.FixtureRequest) -> Setting:
    """A target, inputs, and the 16 tokens plain `generate()` goes on with."""
    family = FAMILY_BY_NAME[request.param]
    target = family.build_target()
    inputs = family.build_inputs(target)
    return target, inputs, target.generate(**inputs, max_new_tokens=16)


@pytest.fixture(params=BUDGETS)
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(caches, "MAX_CARRIED", request.param)
    return request.param


def new_cache(target: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=target.config.get_text_config())


def tensors_of(cache: Any) -> list[Tensor]:
    return [*(tensor for pair in cache_tensors(cache) for tensor in pair), *recurrent_states(cache)]


def assert_same_cache(plain: Any, ours: Any) -> None:
    assert plain.get_seq_length() == ours.get_seq_length()
    assert recurrent_states(plain)
    for expected, found in zip(tensors_of(plain), tensors_of(ours), strict=True):
        # Entries are about 1. Several rows at once are rounded differently from one at a time.
        assert torch.allclose(expected, found, atol=1e-3)


# -- the same text ----------------------------------------------------------------------------------------------------


def check_cases(numbers: range, run: Callable[[Case], str | None] = mismatch, **fixed: Any) -> None:
    found: dict[str, str] = {}
    for case in (make_case(number, family=NAMES[number % 2], **fixed) for number in numbers):
        what = run(case)
        # A token at the threshold of top_p may fall on either side of it by rounding, which fp64 tells.
        if what is not None and not (what.startswith("scores differ") and mismatch_in_fp64(case) is None):
            found[str(case)] = what
    assert not found


def mismatch_in_fp64(case: Case) -> str | None:
    def built(family: str, attn_implementation: str) -> PreTrainedModel:
        target = FAMILY_BY_NAME[family].build_target(attn_implementation).double()
        # The other kernels for experts know no fp64.
        target.set_experts_implementation("eager")
        return target

    # Plain `generate()` in fp64 with eager attention gives NaN now and then (transformers 5.24).
    with mock.patch.object(lossless, "built_target", built):
        return mismatch(dataclasses.replace(case, attn_implementation="sdpa"))


def test_random_cases(budget: int) -> None:
    check_cases(range(8 * budget, 8 * budget + 6))


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, 600, 50))
def test_many_random_cases(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAX_CARRIED", BUDGETS[first // 50 % 3])
    check_cases(range(first, first + 50))


def test_random_cases_in_fp64() -> None:
    check_cases(range(100, 104), mismatch_in_fp64)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, 150, 50))
def test_many_random_cases_in_fp64(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAX_CARRIED", BUDGETS[first // 50])
    check_cases(range(first, first + 50), mismatch_in_fp64)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_texts_part_at_near_ties_only(name: str) -> None:
    """A forward of several rows rounds differently from one of a single row, in recurrent layers as in any other."""
    differing, gaps = 0, []
    for seed in range(30):
        target = FAMILY_BY_NAME[name].build_target(seed=seed).bfloat16()
        inputs = FAMILY_BY_NAME[name].build_inputs(target, seed=seed)
        kwargs = {"max_new_tokens": 32, "do_sample": False}
        plain = target.generate(**inputs, **kwargs, return_dict_in_generate=True, output_logits=True)
        text = plain.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        draft = SparrowDraftModel.from_target(target)
        with drafting_around(text, adversarial=True, seed=seed):
            ours = target.generate(**inputs, **kwargs, assistant_model=draft)[0, inputs["input_ids"].shape[1] :]
        parts_at = first_difference(text, ours.tolist())
        if parts_at is not None:
            differing += 1
            logits = plain.logits[parts_at][0]
            gaps.append(float((logits[text[parts_at]] - logits[ours[parts_at]]) / logits.std()))
    print(f"{name}: {differing} of 30 texts part, at gaps of", *(f"{gap:.3f}" for gap in gaps), "standard deviations")
    assert differing <= 8 and all(gap < 0.05 for gap in gaps)


def test_a_tree_becomes_the_chain_of_its_depth(setting: Setting) -> None:
    target, inputs, text = setting
    draft = SparrowDraftModel.from_target(target, num_tree_nodes=14, num_draft_levels=4, beam_width=3)
    with pytest.warns(UserWarning, match="cannot verify trees: .* chains of 4 tokens") as seen:
        assert torch.equal(target.generate(**inputs, max_new_tokens=16, assistant_model=draft), text)
    assert len([warning for warning in seen if "verify trees" in str(warning.message)]) == 1
    chain = SparrowDraftModel.from_target(target, num_draft_levels=4)
    chain.load_state_dict(draft.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* cannot verify trees")
        target.generate(**inputs, max_new_tokens=16, assistant_model=chain)
    assert draft.last_generation.accepted == chain.last_generation.accepted
    # The draft itself is as it was.
    assert draft.config.tree_shape == (14, 4, 3)


# -- the carried tokens -----------------------------------------------------------------------------------------------


def test_rows_of_the_forwards(setting: Setting, budget: int) -> None:
    """Accepted tokens of a round with a rejected draft lead the next forward, and go with a round that commits all."""
    target, inputs, text = setting
    prompt = inputs["input_ids"].shape[1]
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3)
    rows: list[int] = []
    seen: set[tuple[int, int]] = set()
    hook = target.get_decoder().register_forward_hook(lambda module, args, output: rows.append(output[0].shape[1]))
    for seed in range(3):
        rows.clear()
        with drafting_around(text[0, prompt:].tolist(), adversarial=True, seed=seed):
            target.generate(**inputs, max_new_tokens=16, assistant_model=draft)
        expected, carried, left = [], 0, 15
        for accepted in draft.last_generation.accepted:
            levels = 0 if carried > budget else min(3, left - 1)
            expected.append(carried + 1 + levels)
            carried = 0 if accepted == levels else carried + accepted + 1
            left -= accepted + 1
            seen.add((levels, accepted))
        assert rows[1:] == expected
    hook.remove()
    # Rounds of every kind: all rejected, some, none; and, within a budget, a root alone that commits what was carried.
    assert {(3, 0), (3, 2), (3, 3)} <= seen and ((0, 0) in seen or budget == 1000)


@pytest.mark.parametrize(
    "new_tokens", [1, 3, 16, *(pytest.param(new, marks=pytest.mark.full) for new in (2, 4, 7, 11))]
)
@pytest.mark.parametrize("passed", [True, False])
def test_the_cache_is_plains(setting: Setting, new_tokens: int, passed: bool) -> None:
    target, inputs, text = setting
    prompt = inputs["input_ids"].shape[1]
    draft = SparrowDraftModel.from_target(target)
    found = []
    for assistant in (None, draft):
        kwargs: dict[str, Any] = {CACHE: new_cache(target)} if passed else {"return_dict_in_generate": True}
        with drafting_around(text[0, prompt:].tolist(), adversarial=True, seed=new_tokens):
            output = target.generate(**inputs, **kwargs, max_new_tokens=new_tokens, assistant_model=assistant)
        found.append(kwargs[CACHE] if passed else output[CACHE])
    assert_same_cache(*found)


def test_a_cache_that_nobody_holds_is_not_brought_up_to_date(setting: Setting) -> None:
    target, inputs, text = setting
    draft = SparrowDraftModel.from_target(target)
    with mock.patch.object(verifiers.TargetVerifier, "_read_carried", side_effect=AssertionError):
        assert torch.equal(target.generate(**inputs, max_new_tokens=16, assistant_model=draft), text)


@pytest.mark.parametrize("first, second", [(True, True), (True, False), (False, True)])
def test_two_turns(setting: Setting, first: bool, second: bool) -> None:
    target, inputs, text = setting
    prompt = inputs["input_ids"].shape[1]
    draft = SparrowDraftModel.from_target(target)

    def two_turns(*with_draft: bool) -> tuple[Tensor, DynamicCache]:
        cache = new_cache(target)
        assistants = [draft if wanted else None for wanted in with_draft]
        with drafting_around(text[0, prompt:].tolist(), adversarial=True, seed=2):
            said = target.generate(**inputs, **{CACHE: cache}, max_new_tokens=9, assistant_model=assistants[0])
        ids = torch.cat((said, QUESTION), dim=1)
        mask, kwargs = torch.ones_like(ids), {CACHE: cache, "max_new_tokens": 8}
        return target.generate(input_ids=ids, attention_mask=mask, **kwargs, assistant_model=assistants[1]), cache

    (plain, plain_cache), (ours, our_cache) = two_turns(False, False), two_turns(first, second)
    assert torch.equal(plain, ours)
    assert_same_cache(plain_cache, our_cache)


# -- what else generate() offers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 1000, pytest.param(1, marks=pytest.mark.full)])
def test_chunked_prefill(setting: Setting, chunk: int) -> None:
    target, inputs, text = setting
    draft = SparrowDraftModel.from_target(target)
    with drafting_around(text[0, inputs["input_ids"].shape[1] :].tolist(), adversarial=True, seed=chunk):
        ours = target.generate(**inputs, max_new_tokens=16, prefill_chunk_size=chunk, assistant_model=draft)
    assert torch.equal(target.generate(**inputs, max_new_tokens=16, prefill_chunk_size=chunk), ours)


def test_left_padding(setting: Setting) -> None:
    target, inputs, _ = setting
    pad = target.generation_config.pad_token_id
    padded = dict(inputs)
    padded["input_ids"] = torch.cat((torch.full((1, 5), pad), inputs["input_ids"]), dim=1)
    for name, value in (("attention_mask", 0), ("mm_token_type_ids", 0)):
        padded[name] = torch.cat((inputs[name].new_full((1, 5), value), inputs[name]), dim=1)
    caches_of = []
    text = target.generate(**padded, max_new_tokens=16)
    draft = SparrowDraftModel.from_target(target)
    for assistant in (None, draft):
        caches_of.append(new_cache(target))
        with drafting_around(text[0, padded["input_ids"].shape[1] :].tolist(), adversarial=True, seed=1):
            kwargs = {CACHE: caches_of[-1], "max_new_tokens": 16, "assistant_model": assistant}
            assert torch.equal(target.generate(**padded, **kwargs), text)
    assert_same_cache(*caches_of)


def test_hidden_states_and_attentions() -> None:
    family = FAMILY_BY_NAME["qwen3_5"]
    target = family.build_target("eager")
    inputs, draft = family.build_inputs(target), SparrowDraftModel.from_target(target)
    kwargs = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_hidden_states": True}
    plain = target.generate(**inputs, **kwargs, output_attentions=True)
    with drafting_around(plain.sequences[0, inputs["input_ids"].shape[1] :].tolist(), adversarial=True, seed=3):
        ours = target.generate(**inputs, **kwargs, output_attentions=True, assistant_model=draft)
    assert torch.equal(plain.sequences, ours.sequences)
    for name in ("hidden_states", "attentions"):
        assert len(plain[name]) == len(ours[name]) == 12
        for expected, found in zip(plain[name], ours[name], strict=True):
            for expected_layer, found_layer in zip(expected, found, strict=True):
                assert expected_layer.shape == found_layer.shape
                torch.testing.assert_close(found_layer, expected_layer, atol=5e-4, rtol=1e-4)


def test_one_prefill_for_several_arms(setting: Setting) -> None:
    target, inputs, _ = setting
    draft = SparrowDraftModel.from_target(target)
    arms = [Arm("plain"), Arm("chain", draft, draft.config.tree_shape)]
    runs = compare(target, arms, inputs, {"max_new_tokens": 12, "do_sample": False}, shared_prefill=True)
    assert runs["chain"].differs_at is None
    # The snapshot is not used up by a call.
    snapshot = PrefillSnapshot(target, inputs, {"do_sample": False}, layers=set())
    texts = []
    for _ in range(2):
        with snapshot.replayed() as replayed:
            texts.append(target.generate(**replayed, max_new_tokens=12))
    assert torch.equal(texts[0], texts[1])


# -- exceptions -------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Raised on purpose."""


@pytest.mark.parametrize("again", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("place", ["first-layer", "between-layers", "head", "walk"])
def test_something_raises(setting: Setting, place: str, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache holds is a part of the committed text in every layer, and all of it if the target can read it."""
    target, inputs, text = setting
    prompt = inputs["input_ids"].shape[1]
    layers = target.get_decoder().layers
    owner, name = {
        "first-layer": (layers[0], "forward"),
        "between-layers": (layers[2], "forward"),
        "head": (target.get_output_embeddings(), "forward"),
        "walk": (decoding.TokenEmitter, "choose"),
    }[place]
    stock, calls = getattr(owner, name), []

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 or (again and len(calls) > 4):
            raise Stop
        return stock(*args, **kwargs)

    cache, draft = new_cache(target), SparrowDraftModel.from_target(target)
    monkeypatch.setattr(owner, name, raising)
    with pytest.raises(Stop), drafting_around(text[0, prompt:].tolist(), adversarial=True, seed=1):
        target.generate(**inputs, **{CACHE: cache}, max_new_tokens=16, assistant_model=draft)
    monkeypatch.undo()
    length, committed = cache.get_seq_length(), draft.last_generation.new_tokens
    # Plain `generate()` has the newest token's row too if it raises behind the last layer or in choosing the next.
    most = prompt + committed - (place not in ("head", "walk"))
    assert length <= most and (length == most or (again and place != "walk"))
    fresh = new_cache(target)
    target.generate(**inputs, **{CACHE: fresh}, max_new_tokens=length - prompt + 1)
    assert_same_cache(fresh, cache)
