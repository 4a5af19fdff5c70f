"""Acceptance counts against a walk done by hand."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments
from sparrow_hf.training.acceptance import acceptance_metrics, count_acceptance, simulate_rounds
from sparrow_hf.training.passes import DraftBatch
from sparrow_hf.tree_shapes import tree_name


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

    counts = count_acceptance(batch, [first, second], 2)
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


def test_a_batch_of_short_answers_has_as_many_counts_as_one_of_long_answers():
    # Chains of three tokens; an answer of one loss has one pass, an answer of four has three.
    short = count_acceptance(batch_of(1), [torch.tensor([[True]])], 3)
    passes = [torch.ones(1, 4).bool(), torch.tensor([[1, 0, 1]]).bool(), torch.ones(1, 2).bool()]
    long = count_acceptance(batch_of(4), passes, 3)
    # The short one is a round of one token. The long one: three tokens from loss 0, and the round is the whole answer.
    assert short.tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0, 1]]
    assert long.tolist() == [[4, 2, 2, 4, 3, 2, 1, 1, 1, 1]]
    pooled = np.concatenate([short.numpy(), long.numpy()])
    metrics = acceptance_metrics(EvalPrediction(predictions=pooled, label_ids=pooled))
    assert metrics == {
        "agreement_1": 1.0,
        "agreement_2": pytest.approx(2 / 3),
        "agreement_3": 1.0,
        "k": 2.0,
        "tau": 3.0,
        "accepted_1": 1.0,
        "accepted_2": 0.5,
        "accepted_3": 0.5,
    }


def test_a_draft_without_levels_is_the_target_alone(tmp_path, target, make_draft, samples):
    args = SparrowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    draft = make_draft(num_draft_levels=0)
    assert tree_name(draft.config.tree_shape) == "none"
    trainer = SparrowTrainer(draft, target, args, eval_dataset=samples)
    metrics = trainer.evaluate()
    assert metrics["eval_k"] == 0 and metrics["eval_tau"] == 1 and metrics["eval_loss"] > 0
    assert not any(name.startswith(("eval_accepted", "eval_agreement")) for name in metrics)
    # Every answer token is a round, whatever the one pass that gives the loss has matched.
    counts = count_acceptance(batch_of(6, 3), [torch.ones(2, 6).bool()], 0)
    assert counts.tolist() == [[9]]


def test_figures_do_not_depend_on_how_rows_are_batched(tmp_path, target, make_draft, samples):
    start = samples[0]["answer_start"]
    # One word and the end of the turn: one loss.
    word = {
        name: value[:, : start + 2] if getattr(value, "shape", None) == samples[0]["input_ids"].shape else value
        for name, value in samples[0].items()
    }
    found = []
    for size in (1, 2, 3):
        args = SparrowTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=size
        )
        trainer = SparrowTrainer(make_draft(num_draft_levels=5), target, args, eval_dataset=[word, *samples[:2]])
        metrics = trainer.evaluate()
        found.append({name: metrics[name] for name in metrics if name.startswith(("eval_a", "eval_k", "eval_tau"))})
    assert set(found[2]) >= {"eval_accepted_5", "eval_agreement_5", "eval_k", "eval_tau"}
    # All rows in one batch: nothing is put together.
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("levels", [0, 2, 7])
def test_the_loss_of_an_evaluation_is_of_the_passes_of_training(tmp_path, target, make_draft, samples, levels):
    # Without a glimpse, nothing of a training step is random.
    args = SparrowTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", num_visual_rows_min=0, num_visual_rows_max=0
    )
    draft = make_draft(num_draft_levels=levels, num_mtp_steps=4, num_glimpse_tokens=0)
    trainer = SparrowTrainer(draft, target, args, eval_dataset=samples)
    expected = trainer.compute_loss(draft.train(), trainer.data_collator(samples)).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert sum(name.startswith("eval_agreement") for name in metrics) == levels
