"""Losses against values computed by hand."""

import math

import pytest
import torch

from sparrow_hf.training.losses import (
    feature_smooth_l1,
    list_mle,
    mixed_loss,
    probability_l1,
    soft_cross_entropy,
)

INF = float("inf")
# Probabilities over four tokens, the third of which is never drafted.
DRAFT = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
TARGET = torch.tensor([[0.25, 0.5, 0.0, 0.25]]).log()


def test_values_by_hand():
    assert DRAFT[0, 2] == -INF
    cross_entropy = -(0.25 * math.log(0.5) + 0.5 * math.log(0.25) + 0.25 * math.log(0.25))
    assert float(soft_cross_entropy(DRAFT, TARGET)) == pytest.approx(cross_entropy)
    assert float(probability_l1(DRAFT, TARGET)) == pytest.approx(0.5)
    # the target's order is 1, 0, 3; of the draft's mass, 1 takes 1/4, then 0 takes 2/3 of what is left
    target = torch.tensor([[0.3, 0.5, 0.0, 0.2]]).log()
    assert float(list_mle(DRAFT, target)) == pytest.approx(-math.log(0.25) - math.log(0.5 / 0.75))
    states = torch.tensor([[0.0, 3.0]])
    assert float(feature_smooth_l1(states, torch.tensor([[0.5, 0.0]]))) == pytest.approx((0.125 + 2.5) / 2)


@pytest.mark.parametrize("loss", [soft_cross_entropy, probability_l1, list_mle])
def test_excluded_tokens_give_no_nan(loss):
    scores = torch.randn(5, 12, requires_grad=True)
    excluded = torch.zeros(12, dtype=torch.bool)
    excluded[[3, 7, 8]] = True
    target = torch.randn(5, 12).masked_fill(excluded, -INF).log_softmax(-1)
    value = loss(scores.masked_fill(excluded, -INF), target)
    assert value.shape == (5,) and value.isfinite().all()
    value.sum().backward()
    assert scores.grad.isfinite().all() and (scores.grad[:, excluded] == 0).all()
    assert scores.grad[:, ~excluded].abs().sum() > 0


def test_cross_entropy_is_least_at_the_target():
    target = torch.randn(3, 7).log_softmax(-1)
    draft = target.clone().requires_grad_()
    soft_cross_entropy(draft, target).sum().backward()
    assert draft.grad.abs().max() < 1e-6


def test_mix_is_the_weighted_sum():
    states, target_states = torch.randn(3, 4), torch.randn(3, 4)
    scores, target_scores = torch.randn(3, 20), torch.randn(3, 20).log_softmax(-1)
    weights = {"soft_cross_entropy": 2.0, "probability_l1": 10.0, "list_mle": 0.1, "feature_smooth_l1": 0.5}
    expected = (
        2 * soft_cross_entropy(scores, target_scores)
        + 10 * probability_l1(scores, target_scores)
        + 0.1 * list_mle(scores, target_scores)
        + 0.5 * feature_smooth_l1(states, target_states)
    )
    torch.testing.assert_close(mixed_loss(weights, states, target_states, scores, target_scores), expected)
