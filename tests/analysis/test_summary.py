"""Pooling by hand, and the rule of the recommendation on figures made up for it."""

import pytest

from sparrow_hf.analysis.summary import Recommendation, pool, recommend, summarize

LAYERS = 4


def record(visual_tokens=100, answer_tokens=10, agreed=(2, 5, 10, 10, 10), looked=(0.1, 0.5, 0.2, 0.0), **extra):
    """A record of a target of four layers and two heads."""
    attention = [[[0.9 - mass, mass, 0.1]] * 2 for mass in looked]
    return {
        "visual_tokens": visual_tokens,
        "answer_tokens": answer_tokens,
        "attention": {"last_instruction": attention, "answer": attention},
        "similarity": {"visual": [0.9, 0.4, 0.6, 0.2], "text": [0.8, 0.7, 0.6, 0.5]},
        "agreed": {str(layer): tokens for layer, tokens in enumerate(agreed)},
    } | extra


def test_agreement_and_acceptance_are_totals_the_rest_means():
    kept = {"strided": {"1": {"accepted": [2, 0], "tokens": 4}}}
    more = {"strided": {"1": {"accepted": [3], "tokens": 4}}}
    first = record(answer_tokens=10, score={"0": 0.5}, retention=kept)
    second = record(visual_tokens=120, answer_tokens=30, agreed=(30,) * 5, score={"0": 1.0}, retention=more)
    pooled = pool([first, second])
    assert pooled["prompts"] == 2
    assert pooled["visual_tokens"] == {"min": 100, "mean": 110.0, "max": 120}
    assert pooled["agreement"] == {"0": 32 / 40, "1": 35 / 40, "2": 1.0, "3": 1.0, "4": 1.0}
    assert pooled["score"] == {"0": 0.75}
    assert pooled["retention"] == {"strided": {"1": {"tau": 8 / 3, "k": 5 / 3, "rounds": 3}}}
    assert pooled["attention"]["answer"][1][0] == pytest.approx([0.4, 0.5, 0.1])


def test_prompts_of_about_one_length_are_one_group():
    summary = summarize([record(visual_tokens=length) for length in (300, 5000, 256, 511)])
    assert [(group["prompts"], group["visual_tokens"]["min"]) for group in summary["lengths"]] == [(3, 256), (1, 5000)]
    assert summary["all"]["prompts"] == 4


def test_the_rule():
    """Two layers need visual tokens; the second one reads state 1 only; layer 1 (0-based) attends to them most."""
    assert recommend(pool([record()])) == Recommendation(2, 1, [2, -1])
    # Three layers need them: of the states 1 and 2, the second is less like the inputs.
    assert recommend(pool([record(agreed=(2, 5, 8, 10, 10))])) == Recommendation(3, 2, [2, 3, -1])


@pytest.mark.parametrize(
    ("whole", "hidden", "needed"), [(1.0, 0.95, 2), (1.0, 0.94, 3), (-20.0, -21.0, 2), (-20.0, -21.2, 3)]
)
def test_an_answer_that_keeps_its_wording_but_not_its_score_needs_visual_rows(
    whole: float, hidden: float, needed: int
):
    scores = {"0": -99.0, "1": -50.0, "2": hidden, "3": whole, "4": whole}
    assert recommend(pool([record(score=scores)])).needed_layers == needed


def test_visual_rows_missed_later_are_needed_after_all():
    assert recommend(pool([record(agreed=(2, 10, 10, 8, 10))])).needed_layers == 4


def test_a_target_that_needs_them_to_the_end_or_not_at_all():
    assert recommend(pool([record(agreed=(0, 0, 0, 0, 10))])) == Recommendation(4, 2, [2, -1])
    assert recommend(pool([record(agreed=(10,) * 5)])) == Recommendation(0, 1, [1, -1])
