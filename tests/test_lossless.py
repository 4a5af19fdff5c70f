"""The promise, over random cases: same tokens, same stop, same stream, same scores as plain `generate()`."""

import pytest
import torch

from lossless import agree, make_case, mismatch

NUM_FAST = 300
NUM_FULL = 3300


@pytest.mark.parametrize("first", range(0, NUM_FAST, 30))
def test_random_cases(first: int) -> None:
    found = {number: mismatch(make_case(number)) for number in range(first, first + 30)}
    assert not {number: what for number, what in found.items() if what is not None}


def test_random_cases_of_a_family_with_timm() -> None:
    pytest.importorskip("timm", reason="the vision tower of perception_lm is timm's, installed for the full tier only")
    found = {number: mismatch(make_case(number, family="perception_lm", prompt="plain")) for number in range(20)}
    assert not {number: what for number, what in found.items() if what is not None}


@pytest.mark.full
@pytest.mark.parametrize("first", range(NUM_FAST, NUM_FULL, 90))
def test_many_random_cases(first: int) -> None:
    found = {number: mismatch(make_case(number)) for number in range(first, min(first + 90, NUM_FULL))}
    assert not {number: what for number, what in found.items() if what is not None}


def test_scores_agree_if_only_a_tie_at_the_border_differs() -> None:
    lowest = -torch.inf
    scores = torch.tensor([[3.0, 1.0, 1.00001, lowest]])
    assert agree(scores, torch.tensor([[3.0, 1.0, lowest, lowest]]))
    assert agree(scores, torch.tensor([[3.00001, 1.00001, 1.0, lowest]]))
    assert agree(torch.tensor([[3.0, lowest, 1.0]]), torch.tensor([[3.0, 1.00001, lowest]]))
    assert not agree(scores, torch.tensor([[3.0, 1.0, 1.00001, 0.9]]))
    assert not agree(scores, torch.tensor([[lowest, 1.0, 1.00001, lowest]]))
    assert not agree(scores, torch.tensor([[3.0, 1.1, 1.00001, lowest]]))
