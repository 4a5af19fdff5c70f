"""The preview and the cost estimate of a training are correct."""

import pytest
import torch

from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments
from sparrow_hf.training.preview import estimate_cost, preview_sample

from families import FAMILY_BY_NAME


@pytest.fixture
def trainer(tmp_path, target, make_draft, samples):
    arguments = SparrowTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        num_train_epochs=3,
        per_device_train_batch_size=2,
        num_visual_rows_min=5,
        num_visual_rows_max=5,
        save_total_limit=2,
    )
    return SparrowTrainer(make_draft(), target, arguments, train_dataset=samples)


def test_rows_shift_and_loss_mask(trainer, samples):
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    sample = samples[0]
    preview = preview_sample(trainer, sample, family.tokenizer)
    ids, start = sample["input_ids"][0].tolist(), sample["answer_start"]
    visual = family.visual_token_ids
    text = [family.tokenizer.convert_ids_to_tokens(token) for token in ids if token not in visual]
    rows = [row for row in preview.rows if row.state_of is not None]
    # text row t reads the state of token t and the embedding of token t + 1; the last two predict nothing
    assert [row.state_of for row in rows] == text[:-2]
    assert [row.embedding_of for row in rows] == text[1:-1]
    answer = len(ids) - start
    assert [row.predicts for row in rows if row.predicts] == text[-answer + 1 :]
    assert preview.num_loss_rows == answer - 1
    assert rows[-1].predicts == text[-1]
    assert preview.num_visual_rows == 5 == len(preview.rows) - len(rows)
    assert sum(length for _, length in preview.visual_runs) == sum(token in visual for token in ids)
    for first, length in preview.visual_runs:
        assert all(token in visual for token in ids[first : first + length]) and ids[first - 1] not in visual
    assert [row.position for row in preview.rows] == list(range(len(preview.rows)))


def test_costs(trainer, target, samples):
    before = {name: tensor.clone() for name, tensor in trainer.draft.state_dict().items()}
    cost = estimate_cost(trainer, target)
    parameters = sum(parameter.numel() for parameter in trainer.draft.parameters())
    assert cost.draft_parameters == parameters
    assert cost.training_bytes == 16 * parameters  # fp32 weights, gradients and two averages
    assert cost.checkpoint_bytes == 12 * parameters and cost.checkpoints_bytes == 24 * parameters
    assert cost.target_bytes == 4 * sum(parameter.numel() for parameter in target.parameters())
    assert cost.optimizer_steps == 3 * len(samples) // 2 and cost.measured_rows == len(samples)
    assert cost.longest_row == max(sample["input_ids"].shape[1] for sample in samples)
    assert cost.seconds > 0 and cost.peak_bytes is None
    for name, tensor in trainer.draft.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in trainer.draft.parameters())
