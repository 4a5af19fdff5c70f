"""Acceptance counts against a walk done by hand."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from sparrow_hf.training.acceptance import acceptance_metrics, count_acceptance, simulate_rounds
from sparrow_hf.training.passes import DraftBatch


def batch_of(*num_losses):
    longest = max(num_losses)
    empty = torch.zeros(len(num_losses), 0)
    return DraftBatch(
        **dict.fromkeys(
            ("next_ids", "text_states", "text_positions", "visual_states", "visual_positions", "position_ids"), empty
        ),
        first_loss=torch.zeros(len(num_losses), dtype=torch.long),
        num_losses=torch.tensor(num_losses),
        target_states=torch.zeros(len(num_losses), longest, 1),
    )


def test_rounds_and_figures_by_hand():
    # Chains of two tokens. Sample 0 has 6 loss rows, sample 1 has 3; column u of pass s is row u + s.
    batch = batch_of(6, 3)
    first = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    second = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()
    # sample 0: from 0 both match → next start 3: both match (row 4 in pass 1) → next start 6: over
    # sample 1: from 0 one matches → next start 2: one matches, the second would lie past the end → over
    assert [int(length) for length in simulate_rounds(batch, [first, second])] == [2, 2, 1, 1]

    counts = count_acceptance(batch, [first, second])
    # rows: 9 in the first pass, 5 + 2 in the second; positions after the end of sample 1 are not counted
    assert counts.tolist() == [[4 + 3, 4 + 1, 9, 7, 4, 2, 4]]
    pooled = np.concatenate([counts.numpy(), counts.numpy()])
    metrics = acceptance_metrics(EvalPrediction(predictions=pooled, label_ids=pooled))
    assert metrics == {
        "agreement_1": pytest.approx(7 / 9),
        "agreement_2": pytest.approx(5 / 7),
        "k": 1.5,
        "tau": 2.5,
        "accepted_1": 1.0,
        "accepted_2": 0.5,
    }
