"""Replayed rounds are the rounds of `generate()`, and the rows kept are those of the highest scores."""

import pytest
import torch

from sparrow_hf.analysis import retention as room
from sparrow_hf.analysis.answered import Conversation, answer, process_conversation
from sparrow_hf.analysis.retention import best_rows, layers_of, replay, retention
from sparrow_hf.draft_inputs import draft_positions
from sparrow_hf.generation.candidate_generator import SparrowCandidateGenerator
from sparrow_hf.hidden_states import HiddenStateCollector
from sparrow_hf.testbed import EVALUATION_SEEDS, load, make_clip

MAX_NEW_TOKENS = 40


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The testbed's target and draft, an answered prompt, and the states of it."""
    target, processor, draft = load()
    clip = make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", EVALUATION_SEEDS[3], visual_tokens=96)
    answered = answer(target, process_conversation(processor, Conversation(clip.messages)), MAX_NEW_TOKENS)
    draft.bind(target)
    with torch.no_grad(), HiddenStateCollector(dict.fromkeys(layers_of(draft))).active() as collector:
        target(**answered.inputs, use_cache=False)
    return target, draft, answered, {layer: collector.take(layer) for layer in layers_of(draft)}


def generated(target, draft, answered):
    target.generate(**answered.prompt.inputs, assistant_model=draft, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return draft.last_generation


def own_rows(draft, answered):
    ids = answered.inputs["input_ids"][0, : answered.prompt_length]
    return draft_positions(ids, draft.config.visual_token_ids, draft.config.num_glimpse_tokens)


@pytest.mark.parametrize(("tree", "glimpse"), [((6, 5, 1), 16), ((6, 5, 1), 0), ((30, 4, 8), 64)])
def test_a_replay_has_the_rounds_of_generate(shipped, tree, glimpse, monkeypatch):
    target, draft, answered, states = shipped
    monkeypatch.setattr(draft.config, "num_glimpse_tokens", glimpse)
    monkeypatch.setattr(draft.config, "num_tree_nodes", tree[0])
    monkeypatch.setattr(draft.config, "num_draft_levels", tree[1])
    monkeypatch.setattr(draft.config, "beam_width", tree[2])
    expected = generated(target, draft, answered)
    rounds = replay(draft, answered, states, own_rows(draft, answered), MAX_NEW_TOKENS)
    assert rounds.accepted == expected.accepted
    assert rounds.tokens == expected.new_tokens - 1
    assert sum(rounds.accepted) > len(rounds.accepted), "a draft that knows its trade"


def test_planted_bug_a_replay_that_feeds_the_wrong_states_differs(shipped, monkeypatch):
    target, draft, answered, states = shipped
    right = SparrowCandidateGenerator.extend
    monkeypatch.setattr(
        SparrowCandidateGenerator, "extend", lambda self, features, tokens: right(self, features.roll(1, 1), tokens)
    )
    wrong = replay(draft, answered, states, own_rows(draft, answered), MAX_NEW_TOKENS)
    monkeypatch.undo()
    assert wrong.accepted != generated(target, draft, answered).accepted


def test_shares_of_rows_chosen_by_their_scores(shipped, monkeypatch):
    _, draft, answered, states = shipped
    kept = []

    def note(draft, answered, states, rows, max_new_tokens):
        kept.append(rows.visual.tolist())
        return room.Rounds([], 0)

    monkeypatch.setattr(room, "replay", note)
    visual = answered.is_visual.nonzero().squeeze(-1).tolist()
    late = torch.arange(len(visual)).float()
    found = retention(draft, answered, states, {"late": late}, MAX_NEW_TOKENS, shares=(1.0, 0.25, 0.001, 0.0))
    assert list(found) == ["late", "strided"]
    assert list(found["late"]) == [1.0, 0.25, 0.001, 0.0]
    quarter = len(visual) // 4
    assert kept[:4] == [visual, visual[-quarter:], visual[-1:], []]
    # All and none were replayed already; even strides begin early.
    assert len(kept) == 6
    assert len(kept[4]) == quarter and kept[4][0] < visual[quarter]
    assert found["strided"][1.0] is found["late"][1.0]


def test_best_rows_are_ascending():
    rows = torch.tensor([10, 20, 30, 40])
    assert best_rows(rows, torch.tensor([0.3, 0.1, 0.2, 0.4]), 3).tolist() == [10, 30, 40]
    assert best_rows(rows, torch.zeros(4), 0).tolist() == []
