"""Several prompts in one call: row by row the tokens of plain `generate()`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, TextStreamer
from transformers.generation import logits_process

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE, cache_tensors, new_cache
from sparrow_hf.generation import batches, caches
from sparrow_hf.generation.batch_drafts import BatchDrafter
from sparrow_hf.generation.batch_emission import ROW_BY_ROW, BatchEmitter
from sparrow_hf.generation.caches import RaggedCache

from batches import QUESTIONS, BatchCase, OtherRowsToken, batch_of, drafting_around, make_case, mismatch
from families import FAMILY_BY_NAME
from lossless import EveryNthToken, RecordingStreamer, built_target

NUM_FAST = 16
NUM_FULL = 700


@pytest.mark.parametrize("first", range(0, NUM_FAST, 8))
def test_random_batches(first: int) -> None:
    found = {number: mismatch(make_case(number)) for number in range(first, first + 8)}
    assert not {number: what for number, what in found.items() if what is not None}


@pytest.mark.full
@pytest.mark.parametrize("first", range(NUM_FAST, NUM_FULL, 60))
def test_many_random_batches(first: int) -> None:
    found = {number: mismatch(make_case(number)) for number in range(first, min(first + 60, NUM_FULL))}
    assert not {number: what for number, what in found.items() if what is not None}


# -- three rows, in detail --------------------------------------------------------------------------------------------

PROMPTS = [{"videos": 1, "seed": 3}, {"videos": 0, "question": QUESTIONS[2]}, {"videos": 1, "question": "Who?"}]


@pytest.fixture(params=["qwen2_5_vl", "gemma4", "qwen3_5"])
def setting(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, SparrowDraftModel, dict[str, Tensor]]:
    """Full attention with positions of three axes; windows; recurrent layers."""
    family, target = FAMILY_BY_NAME[request.param], built_target(request.param, "eager")
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3)
    return target, draft, batch_of(family, target, PROMPTS)


def around(target: PreTrainedModel, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    """Drafts that are right for a while."""
    plain = target.generate(**inputs, **kwargs)
    return drafting_around(plain[:, inputs["input_ids"].shape[1] :].tolist(), adversarial=True)


def test_everything_that_can_be_returned(setting) -> None:
    target, draft, inputs = setting
    kwargs = {"max_new_tokens": 9, "eos_token_id": list(range(60, 90))}
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True}
    # Of layers with a window, attentions are refused.
    names = ["hidden_states"] if "gemma" in target.config.model_type else ["hidden_states", "attentions"]
    wanted["output_attentions"] = "attentions" in names
    plain = target.generate(**inputs, **kwargs, **wanted)
    with around(target, inputs, **kwargs):
        ours = target.generate(**inputs, **kwargs, **wanted, assistant_model=draft)
    assert torch.equal(plain.sequences, ours.sequences)
    for name in names:
        for steps in zip(plain[name], ours[name], strict=True):
            for expected, found in zip(*steps, strict=True):
                # A layer without attention gives none.
                assert (expected is None and found is None) or torch.allclose(expected, found, atol=1e-4)
    assert all(torch.allclose(*scores, atol=1e-4) for scores in zip(plain.scores, ours.scores, strict=True))
    for expected, found in zip(cache_tensors(plain[CACHE]), cache_tensors(ours[CACHE]), strict=True):
        assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(expected, found, strict=True))


def test_second_turns(setting) -> None:
    """A batch goes on from the cache that the first turn left, whoever took each turn."""
    target, draft, inputs = setting
    said = torch.tensor([[20, 21, 22]]).expand(len(PROMPTS), -1)
    texts = []
    for first, second in ((None, None), (draft, draft), (draft, None), (None, draft)):
        cache = new_cache(target)
        ids = target.generate(**inputs, max_new_tokens=6, assistant_model=first, **{CACHE: cache}, do_sample=False)
        mask = pad(inputs["attention_mask"], (0, 9), value=1)
        turn = {"input_ids": torch.cat((ids, said), dim=1), "attention_mask": mask, CACHE: cache}
        texts.append(target.generate(**turn, max_new_tokens=6, assistant_model=second, do_sample=False))
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_a_streamer_that_raises(setting) -> None:
    """The cache of the caller ends as plain `generate()` leaves it."""

    class Breaks(RecordingStreamer):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.received) == 5:
                raise KeyboardInterrupt

    target, draft, inputs = setting
    found = []
    with around(target, inputs, max_new_tokens=12, do_sample=False):
        for assistant in (None, draft):
            cache, streamer = new_cache(target), Breaks()
            with pytest.raises(KeyboardInterrupt):
                target.generate(
                    **inputs, max_new_tokens=12, assistant_model=assistant, streamer=streamer, **{CACHE: cache}
                )
            found.append((streamer.received, cache_tensors(cache)))
    (plain, plain_rows), (ours, our_rows) = found
    assert plain == ours
    for expected, got in zip(plain_rows, our_rows, strict=True):
        # A window may hold older rows than plain's.
        length = min(expected[0].shape[-2], got[0].shape[-2])
        assert all(
            torch.allclose(a[:, :, -length:], b[:, :, -length:], atol=1e-4) for a, b in zip(expected, got, strict=True)
        )


@pytest.mark.parametrize("setting", ["qwen2_5_vl"], indirect=True)
def test_text_streamers_are_refused_as_by_plain_generate(setting) -> None:
    target, draft, inputs = setting
    for assistant in (None, draft):
        streamer = TextStreamer(FAMILY_BY_NAME["qwen2_5_vl"].tokenizer)
        with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
            target.generate(**inputs, streamer=streamer, assistant_model=assistant, max_new_tokens=4)


@pytest.mark.parametrize("setting", ["qwen2_5_vl"], indirect=True)
def test_trees_become_chains(setting) -> None:
    target, _, inputs = setting
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3, beam_width=4)
    plain = target.generate(**inputs, max_new_tokens=6, do_sample=False)
    with pytest.warns(UserWarning, match="the draft proposes chains of 3 tokens instead of trees"):
        ours = target.generate(**inputs, max_new_tokens=6, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("setting", ["qwen2_5_vl"], indirect=True)
def test_drafts_that_are_no_numbers(setting) -> None:
    target, draft, inputs = setting
    with torch.no_grad():
        draft.fc.weight.fill_(torch.nan)
    plain = target.generate(**inputs, max_new_tokens=6, do_sample=False)
    with pytest.warns(UserWarning, match="the draft's scores are not numbers"):
        ours = target.generate(**inputs, max_new_tokens=6, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, ours)
    # The last of five rounds drafts nothing: there is one token left.
    assert draft.last_generation.failed_drafts == 4


@pytest.mark.parametrize("setting", ["qwen2_5_vl"], indirect=True)
def test_a_padding_token_without_an_embedding(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """At their own pace rows that are done wait for others, and plain decoding feeds no padding to them."""
    target, draft, inputs = setting
    monkeypatch.setattr(target.generation_config, "pad_token_id", None)
    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=-1)
    futures = plain[:, inputs["input_ids"].shape[1] :].tolist()
    # Row 0 is done long before the others.
    futures[1:] = [[20 + token % 20 for token in row] for row in futures[1:]]
    with drafting_around(futures, adversarial=False):
        ours = target.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=-1, assistant_model=draft)
    assert torch.equal(plain, ours)


def test_a_row_of_which_the_draft_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that fills the batch up, all padding: the others are drafted for."""
    family, target = FAMILY_BY_NAME["llava_onevision"], built_target("llava_onevision", "eager")
    draft, seen = SparrowDraftModel.from_target(target, num_draft_levels=3), []

    class Noted(BatchDrafter):
        def propose(self, roots: Tensor, fill: Tensor, max_levels: int) -> Tensor:
            chains = super().propose(roots, fill, max_levels)
            seen.append((self.rows, chains.shape[1]))
            return chains

    monkeypatch.setattr(batches, "BatchDrafter", Noted)
    inputs = batch_of(family, target, [{"videos": 0, "question": "Who?"}, {"videos": 1, "seed": 3}])
    inputs["attention_mask"][0] = 0
    plain = target.generate(**inputs, max_new_tokens=8, do_sample=False)
    ours = target.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, ours)
    assert seen[0] == ([1], 4)
    assert draft.last_generation.new_tokens == 16


@pytest.mark.parametrize(
    ("kwargs", "own_pace"),
    [
        ({}, True),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 3, "suppress_tokens": [5]}, True),
        ({"stopping_criteria": [EveryNthToken(9)]}, True),
        ({"streamer": RecordingStreamer()}, True),
        ({"logits_processor": [OtherRowsToken()]}, False),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [20 + row]}, False),
        ({"do_sample": True}, False),
        ({"return_dict_in_generate": True}, False),
    ],
)
def test_pace(kwargs: dict[str, Any], own_pace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go at their own pace where nothing ties one to another, and only there."""
    family, target = FAMILY_BY_NAME["qwen2_5_vl"], built_target("qwen2_5_vl", "eager")
    draft, paces, stock = SparrowDraftModel.from_target(target), [], batches.may_part

    def noted(*args: Any) -> bool:
        paces.append(stock(*args))
        return paces[-1]

    monkeypatch.setattr(batches, "may_part", noted)
    target.generate(**batch_of(family, target, PROMPTS), max_new_tokens=4, assistant_model=draft, **kwargs)
    assert paces == [own_pace]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_prompts_without_padding_go_at_their_own_pace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, target = FAMILY_BY_NAME[name], built_target(name, "eager")
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3)
    inputs = batch_of(family, target, [{"videos": 1, "seed": 3}, {"videos": 1, "seed": 4}])
    assert inputs["attention_mask"].all()
    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False)
    ragged: list[RaggedCache] = []
    monkeypatch.setattr(batches, "RaggedCache", lambda *args: ragged.append(RaggedCache(*args)) or ragged[-1])
    for seed in range(4):
        futures = plain[:, inputs["input_ids"].shape[1] :].tolist()
        with drafting_around(futures, adversarial=True, seed=seed):
            ours = target.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=draft)
        assert torch.equal(plain, ours)
    assert len(ragged) == 4


@pytest.mark.parametrize("own_pace", [True, False])
@pytest.mark.parametrize("stop", [{"eos_token_id": list(range(40, 80))}, {"stopping_criteria": [EveryNthToken(5)]}])
def test_what_is_behind_the_end_of_a_sequence_is_not_counted(stop: dict[str, Any], own_pace: bool) -> None:
    family, target = FAMILY_BY_NAME["qwen2_5_vl"], built_target("qwen2_5_vl", "eager")
    draft = SparrowDraftModel.from_target(target, num_draft_levels=4)
    inputs = batch_of(family, target, PROMPTS)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1} | stop
    kwargs |= {} if own_pace else {"return_dict_in_generate": True}
    plain = target.generate(**inputs, **kwargs)
    new = (plain if own_pace else plain.sequences)[:, inputs["input_ids"].shape[1] :].tolist()
    # The rows are padded from their ends on; what they have before is text.
    text = [len(row) - next((n for n, token in enumerate(reversed(row)) if token != 0), len(row)) for row in new]
    assert min(text) < max(text)
    with drafting_around(new, adversarial=False):
        target.generate(**inputs, **kwargs, assistant_model=draft)
    assert draft.last_generation.new_tokens == sum(text)


def test_processors_that_treat_rows_alone_exist() -> None:
    assert all(hasattr(logits_process, name) for name in ROW_BY_ROW)


# -- planted bugs -----------------------------------------------------------------------------------------------------


def target_reads_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding counts as text."""
    stock = RaggedCache.prefix_mask

    def mask(self: RaggedCache, given: Tensor) -> Tensor:
        return stock(self, torch.ones_like(given))

    monkeypatch.setattr(RaggedCache, "prefix_mask", mask)


def target_sees_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row has not kept of the longest row's is not masked."""
    monkeypatch.setattr(
        RaggedCache,
        "prefix_mask",
        lambda self, mask: pad(mask[:, : self._prefilled], (0, self.length - self._prefilled), value=1),
    )


def acceptance_of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row's acceptance is applied to another."""
    stock = caches.pack_rows

    def pack(cache: Any, ends: Any, kept: list[int], num_new: int) -> None:
        stock(cache, ends[1:] + ends[:1], kept, num_new)

    monkeypatch.setattr(caches, "pack_rows", pack)


def positions_not_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = RaggedCache.rows_since_prefill.fget
    # What the mask needs stays right.
    right = RaggedCache.prefix_mask

    def mask(self: RaggedCache, given: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RaggedCache, "rows_since_prefill", property(stock))
            return right(self, given)

    monkeypatch.setattr(RaggedCache, "prefix_mask", mask)
    monkeypatch.setattr(
        RaggedCache, "rows_since_prefill", property(lambda self: torch.full_like(stock(self), int(stock(self).max())))
    )


def finished_rows_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished rows are not padded."""
    init = BatchEmitter.__init__

    def without_pad(self: BatchEmitter, *args: Any) -> None:
        init(self, *args)
        self._pad = None

    monkeypatch.setattr(BatchEmitter, "__init__", without_pad)


def columns_before_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends with the first row that has all its tokens."""

    def column(self: BatchEmitter) -> list[int] | None:
        at = self.input_ids.shape[1] - self._prompts.shape[1]
        if all(len(tokens) <= at for tokens in self.new_tokens):
            return None
        return [tokens[at] if at < len(tokens) else tokens[-1] for tokens in self.new_tokens]

    monkeypatch.setattr(BatchEmitter, "_next_column", column)


def all_at_their_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors of any kind are run for each row by itself."""
    monkeypatch.setattr(batches, "treats_rows_alone", lambda processors: True)


GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
BUGS: dict[Callable[[pytest.MonkeyPatch], None], dict[str, Any]] = {
    target_reads_padding: {},
    target_sees_behind_the_end: {},
    acceptance_of_another_row: {},
    positions_not_per_row: {},
    finished_rows_go_on: {"generate_kwargs": GREEDY | {"eos_token_id": list(range(60, 90))}},
    columns_before_they_are_complete: {},
    all_at_their_own_pace: {"own": "keeps a state"},
}


def case_of(fixed: dict[str, Any]) -> BatchCase:
    defaults: dict[str, Any] = {
        "family": "qwen2_5_vl",
        "drafter": "adversary",
        "draft_fields": {"num_draft_levels": 4},
        "generate_kwargs": GREEDY,
        "own": "none",
        "wants": "ids",
        "prompts": PROMPTS,
        "draft_vocab_size": None,
    }
    return make_case(0, **(defaults | fixed))


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_found(plant: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(BUGS[plant])
    assert mismatch(case) is None
    plant(monkeypatch)
    assert mismatch(case) is not None
