"""Which pieces of text are marked as drafted, on a hand-made account of rounds and on a real call."""

from typing import Any

import pytest
import torch

from sparrow_hf import GenerationStats, SparrowDraftModel
from sparrow_hf.clocks import PhaseClock
from sparrow_hf.evaluation import ProvenanceStreamer

from families import FAMILY_BY_NAME
from oracles import drafting_around


class Words:
    """A tokenizer of words; id 0 is the end of the text, and ids 8 and 9 are the halves of one character."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        words = []
        for token in token_ids:
            if token == 9 and words and words[-1] == " \N{REPLACEMENT CHARACTER}":
                words[-1] = " é"
            elif token:
                words.append(" \N{REPLACEMENT CHARACTER}" if token == 8 else f" w{token}")
        return "".join(words).strip()


class Draft:
    """The part of a draft that a streamer reads."""

    def __init__(self) -> None:
        self.last_generation = GenerationStats(num_draft_levels=3, clock=PhaseClock(torch.device("cpu")))


@pytest.fixture
def pieces() -> list[tuple[str, bool]]:
    return []


def streamer(draft: Any, pieces: list[tuple[str, bool]]) -> ProvenanceStreamer:
    built = ProvenanceStreamer(Words(), lambda *piece: pieces.append(piece), draft)
    built.put(torch.tensor([[5, 6, 7]]))  # the prompt
    return built


def test_drafted_tokens_are_marked(pieces: list[tuple[str, bool]]):
    draft = Draft()
    accepted = draft.last_generation.accepted
    stream = streamer(draft, pieces)
    stream.put(torch.tensor([1]))  # from the prefill
    for tokens in ([(2, True), (3, True), (4, False)], [(1, False)], [(2, True), (0, False)]):
        accepted.append(0)
        for token, drafted in tokens:
            accepted[-1] += drafted
            stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == [
        ("w1", False),
        (" w2", True),
        (" w3", True),
        (" w4", False),
        (" w1", False),
        (" w2", True),
    ]


def test_half_a_character_waits_for_the_token_that_completes_it(pieces: list[tuple[str, bool]]):
    draft = Draft()
    stream = streamer(draft, pieces)
    stream.put(torch.tensor([1]))
    draft.last_generation.accepted.append(0)
    stream.put(torch.tensor([8]))
    assert pieces == [("w1", False)]
    draft.last_generation.accepted[-1] += 1
    stream.put(torch.tensor([9]))
    stream.put(torch.tensor([8]))
    stream.end()
    assert pieces == [("w1", False), (" é", True), (" \N{REPLACEMENT CHARACTER}", False)]


def test_without_a_draft_every_token_is_the_targets_own(pieces: list[tuple[str, bool]]):
    stream = streamer(None, pieces)
    stream.put(torch.tensor([1, 2]))
    stream.put(torch.tensor([3]))
    stream.end()
    assert pieces == [("w1 w2", False), (" w3", False)]


def test_marks_agree_with_the_statistics_of_a_real_call():
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    inputs = family.build_inputs(target)
    draft = SparrowDraftModel.from_target(target, num_glimpse_tokens=4, num_draft_levels=4)
    settings = {
        "max_new_tokens": 30,
        "min_new_tokens": 30,
        "do_sample": False,
        "suppress_tokens": family.visual_token_ids,
    }
    prompt_length = inputs["input_ids"].shape[1]
    text = target.generate(**inputs, **settings)[0, prompt_length:].tolist()

    class Letters:
        """One letter per token, so that pieces and tokens correspond."""

        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(0x4E00 + token) for token in token_ids)

    pieces: list[tuple[str, bool]] = []
    with drafting_around(text, adversarial=True):
        target.generate(
            **inputs,
            **settings,
            assistant_model=draft,
            streamer=ProvenanceStreamer(Letters(), lambda *piece: pieces.append(piece), draft),
        )
    expected = [False]
    for accepted in draft.last_generation.accepted:
        expected += [True] * accepted + [False]
    assert len(set(draft.last_generation.accepted)) > 1
    assert [drafted for _, drafted in pieces] == expected[:30]
    assert "".join(piece for piece, _ in pieces) == "".join(chr(0x4E00 + token) for token in text)
