"""A draft that starts as the target's last layers: what FC is fitted to, and that it then drafts without training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.draft_inputs import draft_positions
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.training import SparrowDataCollator, run
from sparrow_hf.training.first_weights import RIDGE, fit_fc, reader_of
from sparrow_hf.training.options import parse_options
from sparrow_hf.training.recording import RecordedDataset, record
from sparrow_hf.training.run import prepare_training

from families import FAMILY_BY_NAME
from tiny_targets import TEXT_SIZES


def copied(target: PreTrainedModel, **overrides: Any) -> SparrowDraftModel:
    torch.manual_seed(0)
    return SparrowDraftModel.from_target(target, copy_last_layer=True, **overrides)


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_fc_is_the_solution_of_the_least_squares(target: Any, samples: list[Any], num_layers: int) -> None:
    draft = copied(target, num_hidden_layers=num_layers)
    explained, count = fit_fc(draft, reader_of(draft), samples, SparrowDataCollator())
    read, wanted = [], []
    for sample in samples:
        inputs = {name: value for name, value in sample.items() if name != "answer_start"}
        states = target(**inputs, output_hidden_states=True).hidden_states
        text = draft_positions(sample["input_ids"][0], draft.config.visual_token_ids, 0).text
        embeds = target.get_input_embeddings()(sample["input_ids"][0, text[2:]])
        read.append(torch.cat((embeds, states[-1][0, text[1:-1]]), dim=-1))
        wanted.append(states[-1 - num_layers][0, text[2:]])
    x, y = (torch.cat(rows).double().numpy() for rows in (read, wanted))
    weights = 1 / np.linalg.norm(y, axis=1, keepdims=True)
    x, y = x * weights, y * weights
    # The ridge as further rows, of which zeros are wanted.
    ridge = np.diag(np.sqrt(RIDGE * (x**2).sum(axis=0)))
    solution = np.linalg.lstsq(np.vstack((x, ridge)), np.vstack((y, np.zeros((x.shape[1], y.shape[1])))))[0]
    np.testing.assert_allclose(draft.fc.weight.numpy(), solution.T, rtol=2e-3, atol=1e-4)
    assert explained == pytest.approx(1 - ((x @ solution - y) ** 2).sum() / (y**2).sum(), abs=1e-3)
    assert 0.5 < explained < 1 and count == len(x)


def test_a_target_whose_last_layer_needs_nothing_but_the_token_is_drafted_for_without_training() -> None:
    """All but the last layer do nothing, and that one has no attention: what enters it is the token's embedding."""
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**TEXT_SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        for layer in target.model.layers[:-1]:
            layer.mlp.down_proj.weight.zero_()
        target.model.norm.weight.uniform_(0.2, 3.0)
    rows = [{"input_ids": torch.randint(3, target.config.vocab_size, (1, 60)), "answer_start": 4} for _ in range(30)]
    draft = copied(target, num_draft_levels=5)
    explained, _ = fit_fc(draft, reader_of(draft), rows, SparrowDataCollator())
    assert explained > 0.99
    options = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False}
    plain = target.generate(input_ids=rows[0]["input_ids"], **options)
    ours = target.generate(input_ids=rows[0]["input_ids"], **options, assistant_model=draft)
    assert torch.equal(plain, ours)
    assert draft.last_generation.accepted == [5, 5, 5, 5]


def test_a_half_of_fc_that_reads_nothing_stays_zero(target: Any, samples: list[Any]) -> None:
    draft = copied(target)
    hidden = draft.config.hidden_size
    with torch.no_grad():
        draft.fc.weight[:, hidden:] = 0
    before = draft.fc.weight[:, :hidden].clone()
    fit_fc(draft, reader_of(draft), samples, SparrowDataCollator())
    assert not draft.fc.weight[:, hidden:].any()
    assert not torch.allclose(draft.fc.weight[:, :hidden], before)


@torch.no_grad()
def test_the_norm_is_the_targets() -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    target.get_decoder().norm.weight.uniform_(0.2, 3.0)
    draft = copied(target)
    states = torch.randn(3, draft.config.hidden_size)
    torch.testing.assert_close(draft.norm(states), target.get_decoder().norm(states))


def words(tmp_path: Path, rows: str, *more: str) -> list[str]:
    said = f"--target t --train {tmp_path}/{rows} --output {tmp_path}/draft --max-steps 1 --use-cpu --copy-last-layer"
    return [*said.split(), "--report-to", "none", "--disable-tqdm", "true", *more]


def test_a_training_begins_with_the_fit(target: Any, samples: list[Any], tmp_path: Path) -> None:
    record(reader_of(copied(target)), samples, tmp_path / "whole", SparrowDataCollator())
    record(copied(target), samples, tmp_path / "narrow", SparrowDataCollator())
    beside = copied(target)
    explained, count = fit_fc(beside, reader_of(beside), samples, SparrowDataCollator())
    fitted = prepare_training(*parse_options(words(tmp_path, "whole")), target, None)
    assert fitted.choices == [
        "FC starts as the best linear estimate of what enters layer "
        f"{target.config.get_text_config().num_hidden_layers} of the target: fitted to {count} tokens, it explains "
        f"{explained:.0%} of it."
    ]
    # Recorded rows come in another order.
    torch.testing.assert_close(fitted.trainer.draft.fc.weight, beside.fc.weight, rtol=1e-2, atol=1e-3)
    (sentence,) = prepare_training(*parse_options(words(tmp_path, "narrow")), target, None).choices
    assert "lacks layer" in sentence and "FC starts at random" in sentence
    # A training that goes on has its own weights.
    fitted.run()
    resumed = prepare_training(*parse_options(words(tmp_path, "whole", "--resume")), target, None)
    assert resumed.choices == []


def test_the_fit_reads_a_recording_of_another_bridge_layer(
    target: Any, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = target.config.get_text_config().num_hidden_layers - 1
    recorded = copied(target, feature_layers=[1, 2, entry, -1], visual_bridge_layer=1)
    assert SparrowDraftModel.from_target(target).config.visual_bridge_layer == 2
    record(recorded, samples, tmp_path / "rows", SparrowDataCollator())
    beside = copied(target)
    explained, count = fit_fc(beside, reader_of(beside), samples, SparrowDataCollator())
    options = parse_options(words(tmp_path, "rows", "--visual-bridge-layer", "1"))
    (sentence,) = prepare_training(*options, target, None).choices
    assert f"fitted to {count} tokens, it explains {explained:.0%} of it." in sentence

    # No other fault is taken for a layer that was not recorded.
    monkeypatch.setattr(run, "reader_of", lambda draft: copied(target))
    with pytest.raises(TrainingDataError, match="lacks visual layer 2, which"):
        prepare_training(*options, target, None)


def test_rows_too_short_to_fit_anything_are_said(target: Any) -> None:
    draft = copied(target)
    with pytest.raises(TrainingDataError, match="cannot be fitted"):
        fit_fc(draft, reader_of(draft), [], SparrowDataCollator())


def test_recorded_rows_are_read_as_those_beside_the_target(target: Any, samples: list[Any], tmp_path: Path) -> None:
    draft, other = copied(target), copied(target)
    record(reader_of(draft), samples, tmp_path, SparrowDataCollator())
    fit_fc(draft, reader_of(draft), samples, SparrowDataCollator())
    fit_fc(other, reader_of(other), RecordedDataset(tmp_path, reader_of(other)), SparrowDataCollator())
    assert torch.equal(draft.fc.weight, other.fc.weight)
