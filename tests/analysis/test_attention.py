"""Attention rows are those of the eager model, on every family, in chunks of any size."""

import pytest
import torch
from subjects import Subject

from sparrow_hf.analysis import attention as room
from sparrow_hf.analysis.attention import AttentionMass, watching_attention
from sparrow_hf.errors import UnsupportedTargetError

from families import FAMILIES, FAMILY_BY_NAME


def rows_of(subject, rows):
    """`(layers, heads, n, L)` attention of some rows, as the sdpa target is watched."""
    found = {}

    def watch(layer, chunks):
        found[layer] = torch.cat([probabilities for _, probabilities in chunks], dim=1)

    with torch.no_grad(), watching_attention(subject.view, watch, rows):
        subject.target(**subject.answered.inputs)
    return torch.stack([found[layer] for layer in sorted(found)])


def eager_attention(subject):
    """`(layers, heads, L, L)` what the eager twin reports."""
    with torch.no_grad():
        return torch.stack(subject.eager(**subject.answered.inputs, output_attentions=True).attentions)[:, 0]


@pytest.mark.parametrize("max_scores", [room.MAX_SCORES, 1000])
def test_rows_equal_the_eager_model(subject, max_scores, monkeypatch):
    monkeypatch.setattr(room, "MAX_SCORES", max_scores)
    rows = torch.arange(1, len(subject.answered.is_visual), 3)
    torch.testing.assert_close(rows_of(subject, rows), eager_attention(subject)[:, :, rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bug", ["positions", "heads", "future"])
def test_planted_bugs_are_noticed(qwen, bug, monkeypatch):
    right = room.attention_rows

    def wrong(attention, hidden_states, position_embeddings, rows):
        if bug == "positions":
            position_embeddings = tuple(part.roll(1, dims=1) for part in position_embeddings)
        for chunk, probabilities in right(attention, hidden_states, position_embeddings, rows):
            if bug == "heads":
                probabilities = probabilities.roll(1, dims=0)
            if bug == "future":
                probabilities = probabilities.roll(1, dims=-1)
            yield chunk, probabilities

    monkeypatch.setattr(room, "attention_rows", wrong)
    monkeypatch.setattr(room, "_gives", lambda *_: True)
    rows = torch.arange(len(qwen.answered.is_visual))
    assert (rows_of(qwen, rows) - eager_attention(qwen)).abs().max() > 1e-3


def test_attention_of_another_kind_is_refused(qwen):
    module = qwen.view.layers[2].self_attn
    handle = module.register_forward_hook(lambda module, args, output: (output[0] * 1.1, *output[1:]))
    try:
        with pytest.raises(UnsupportedTargetError, match="attend in a way that is unknown here"):
            rows_of(qwen, torch.arange(1, len(qwen.answered.is_visual), 3))
    finally:
        handle.remove()


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(FAMILY_BY_NAME.keys() - {family.name for family in FAMILIES}))
def test_other_families_are_exact_or_refused(name):
    try:
        subject = Subject(FAMILY_BY_NAME[name])
        rows = torch.arange(1, len(subject.answered.is_visual), 3)
        found = rows_of(subject, rows)
    except UnsupportedTargetError:
        return
    torch.testing.assert_close(found, eager_attention(subject)[:, :, rows], atol=1e-5, rtol=0)


def test_masses_and_scores_are_sums_over_the_eager_model(subject):
    answered = subject.answered
    expected = eager_attention(subject)
    masses = expected @ answered.groups.float()
    length, last = answered.prompt_length, answered.last_instruction_row
    with torch.no_grad(), AttentionMass(subject.view, answered).gathering() as gathered:
        subject.target(**answered.inputs)

    def close(found, wanted):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

    close(gathered.mass["last_instruction"], masses[:, :, last])
    close(gathered.mass["answer"], masses[:, :, length:].mean(2))
    received = expected[..., answered.is_visual].mean((0, 1))
    text_rows = ~answered.is_visual[:length]
    close(gathered.visual_scores["last_instruction"], received[last])
    close(gathered.visual_scores["all_text"], received[:length][text_rows].mean(0))
    close(gathered.mass["answer"].sum(-1), torch.ones(masses.shape[:2]))
    assert masses[:, :, last, 1].mean() > 0.05, "the last instruction token sees the video"


def test_the_target_is_left_as_it_was_found(qwen):
    def hooks():
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in qwen.target.modules())

    def fail(layer, chunks):
        raise KeyboardInterrupt

    before = hooks()
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        with watching_attention(qwen.view, fail, torch.tensor([0])):
            assert hooks() > before
            qwen.target(**qwen.answered.inputs)
    assert hooks() == before


def test_layers_without_separate_queries_and_keys_are_refused(qwen, monkeypatch):
    monkeypatch.delattr(qwen.view.layers[1].self_attn, "q_proj")
    with pytest.raises(UnsupportedTargetError, match="no self_attn with q_proj"):
        room.attention_modules(qwen.view)
