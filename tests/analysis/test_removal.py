"""Visual tokens hidden from layer x on equal a mask over them, and the limits equal known prompts."""

import pytest
import torch
from subjects import MAX_NEW_TOKENS, ask

from sparrow_hf.analysis.answered import greedy
from sparrow_hf.analysis.removal import agreement, hidden_visual_rows, layer_grid, predicted_tokens, scores
from sparrow_hf.target_config import visual_token_ids


def logits_of(target, inputs):
    with torch.no_grad():
        return target(**inputs, use_cache=False).logits[0]


def hidden_logits(view, answered, from_layer):
    with hidden_visual_rows(view, answered.is_visual, from_layer):
        return logits_of(view.model, answered.inputs)


def test_hidden_from_behind_the_last_layer_nothing_changes(subject):
    depth = len(subject.view.layers)
    logits = logits_of(subject.target, subject.answered.inputs)
    assert torch.equal(hidden_logits(subject.view, subject.answered, depth), logits)


def test_hidden_from_layer_0_is_a_prompt_without_its_visual_rows(subject):
    """The decoder, given the text rows alone at the positions they had, gives the same logits."""
    answered, view = subject.answered, subject.view
    text = ~answered.is_visual
    positions = answered.inputs["position_ids"][..., text]
    with torch.no_grad():
        embeds = view.embedding(answered.inputs["input_ids"][:, text])
        states = view.decoder(
            inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones_like(embeds[..., 0])
        )
        expected = view.head(states.last_hidden_state)[0]
    torch.testing.assert_close(hidden_logits(view, answered, 0)[text], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("from_layer", [1, 2])
def test_hidden_in_between_is_a_mask_over_the_visual_columns(subject, from_layer):
    """The eager twin with minus infinity in the visual columns of its own masks, from that layer on."""
    answered = subject.answered

    def mask_columns(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., answered.is_visual] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    layers = subject.eager_view.layers[from_layer:]
    handles = [layer.self_attn.register_forward_pre_hook(mask_columns, with_kwargs=True) for layer in layers]
    expected = logits_of(subject.eager, answered.inputs)
    for handle in handles:
        handle.remove()
    text = ~answered.is_visual
    for view in (subject.view, subject.eager_view):
        found = hidden_logits(view, answered, from_layer)
        torch.testing.assert_close(found[text], expected[text], atol=1e-4, rtol=0)
    assert (expected - logits_of(subject.eager, answered.inputs))[text].abs().max() > 1e-2


def test_pixels_matter_unless_they_are_hidden(qwen):
    other = ask(qwen.family, qwen.target, seed=5)
    inputs = qwen.answered.inputs | {"pixel_values_videos": other.inputs["pixel_values_videos"]}
    text = ~qwen.answered.is_visual

    def difference(from_layer):
        with hidden_visual_rows(qwen.view, qwen.answered.is_visual, from_layer):
            return (logits_of(qwen.target, qwen.answered.inputs) - logits_of(qwen.target, inputs))[text].abs().max()

    assert difference(0) == 0
    assert difference(1) > 1e-2


def test_decoding_with_a_cache_is_the_forward_over_prompt_and_answer(subject):
    """Freely written tokens are the argmax of the teacher-forced forward, with the rows hidden in both."""
    answered, depth = subject.answered, len(subject.view.layers)
    is_visual = answered.is_visual[: answered.prompt_length]
    for view in (subject.view, subject.eager_view):
        for from_layer in (0, 2, depth):
            with hidden_visual_rows(view, is_visual, from_layer):
                written = greedy(view.model, answered.prompt.inputs, MAX_NEW_TOKENS)[0, answered.prompt_length :]
            both = min(len(written), len(answered.answer_ids))
            ids = answered.inputs["input_ids"].clone()
            ids[0, answered.prompt_length :][:both] = written[:both]
            with hidden_visual_rows(view, answered.is_visual, from_layer):
                logits = logits_of(view.model, answered.inputs | {"input_ids": ids})
            # Placeholders are never written.
            logits[:, visual_token_ids(view.model.config)] = float("-inf")
            predicted = logits[answered.prompt_length - 1 : -1].argmax(-1)
            assert predicted[:both].tolist() == written[:both].tolist()


def test_agreement_counts_tokens_that_stay(qwen):
    expected = predicted_tokens(qwen.view, qwen.answered)
    assert expected.tolist() == qwen.answered.answer_ids, "greedy text, predicted again in one forward"
    found = agreement(qwen.view, qwen.answered, expected, [0, 2, 4])
    assert found[4] == len(expected)
    assert found[0] < len(expected)
    with hidden_visual_rows(qwen.view, qwen.answered.is_visual, 0):
        blind = predicted_tokens(qwen.view, qwen.answered)
    assert found[0] == (blind == expected).sum()


def test_scores_judge_what_is_written_blindly(qwen):
    judged = []

    def score(ids, prompt):
        judged.append(ids)
        return float(ids == qwen.answered.answer_ids)

    found = scores(qwen.view, qwen.answered, [0, 4], MAX_NEW_TOKENS, score)
    assert found == {0: 0.0, 4: 1.0}
    assert judged[1] == qwen.answered.answer_ids


def test_the_grid_has_both_ends():
    assert layer_grid(28) == [0, 4, 7, 10, 14, 18, 21, 24, 28]
    assert layer_grid(3) == [0, 1, 2, 3]
