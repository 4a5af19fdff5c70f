"""The preview and the cost estimate of a training are correct."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparrow_hf.errors import TrainingDataError
from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments
from sparrow_hf.training.lora import add_lora
from sparrow_hf.training.preview import estimate_cost, preview_sample

from families import FAMILY_BY_NAME


@pytest.fixture
def make_trainer(tmp_path, target, make_draft, samples):
    """Builds a trainer of some arguments, for a fresh draft or a given one."""

    def build(draft=None, rows=samples, **options):
        arguments = SparrowTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **options
        )
        return SparrowTrainer(draft or make_draft(), target, arguments, train_dataset=rows)

    return build


@pytest.fixture
def trainer(make_trainer):
    return make_trainer(
        num_train_epochs=3,
        per_device_train_batch_size=2,
        num_visual_rows_min=5,
        num_visual_rows_max=5,
        save_total_limit=2,
        save_strategy="epoch",
    )


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
    attributes, random_state = set(vars(trainer.draft)), torch.get_rng_state()
    cost = estimate_cost(trainer, target)
    parameters = sum(parameter.numel() for parameter in trainer.draft.parameters())
    assert cost.draft_parameters == parameters
    assert cost.training_bytes == 16 * parameters  # fp32 weights, gradients and two averages
    assert cost.checkpoint_bytes == 12 * parameters
    assert cost.num_checkpoints == 2 and cost.checkpoints_bytes == 24 * parameters
    assert cost.target_bytes == 4 * sum(parameter.numel() for parameter in target.parameters())
    assert cost.optimizer_steps == 3 * len(samples) // 2 and cost.measured_rows == len(samples)
    assert cost.longest_row == max(sample["input_ids"].shape[1] for sample in samples) and cost.batch_size == 2
    assert cost.seconds > 0 and cost.peak_bytes is None
    for name, tensor in trainer.draft.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in trainer.draft.parameters())
    assert set(vars(trainer.draft)) == attributes and not trainer.draft.is_activation_checkpointing
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_measured_steps_are_those_of_the_training(make_trainer, target, samples, bf16, checkpointing):
    options = {"per_device_train_batch_size": 2, "save_strategy": "no"}
    options |= {"bf16": bf16, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(max_steps=2, train_sampling_strategy="sequential", **options)
    seen = []

    def note(module, arguments):
        seen.append((torch.is_autocast_enabled("cpu"), arguments[0].shape[0]))

    trainer.draft.layers[0].mlp.register_forward_pre_hook(note)
    estimate_cost(trainer, target)
    measured = list(seen)
    seen.clear()
    trainer.train()
    passes = trainer.draft.config.num_mtp_steps
    # In two batches; with checkpointing the layers run a second time in the backward pass.
    assert measured == seen == [(bf16, 2)] * (2 * passes * (2 if checkpointing else 1))


def test_rows_that_are_all_bad_cost_nothing_and_are_refused(make_trainer, target, samples):
    bad = [sample | {"answer_start": sample["input_ids"].shape[1] - 1} for sample in samples]
    with pytest.raises(TrainingDataError, match="^4 training rows: not one of them can be used, for example"):
        estimate_cost(make_trainer(rows=bad, on_bad_row="skip"), target)
    short = make_trainer(rows=samples, dataloader_drop_last=True, per_device_train_batch_size=8)
    with pytest.raises(TrainingDataError, match="fill no batch of 8"):
        estimate_cost(short, target)


@pytest.mark.parametrize(
    ("rows", "options", "steps", "trained_rows"),
    [
        (10, {"num_train_epochs": 3, "per_device_train_batch_size": 8}, 6, 30),
        (1, {"num_train_epochs": 3, "per_device_train_batch_size": 8}, 3, 3),
        (10, {"num_train_epochs": 3, "per_device_train_batch_size": 8, "dataloader_drop_last": True}, 3, 24),
        (10, {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 6, 20),
        # Five thirds of an epoch of three steps.
        (10, {"num_train_epochs": 1.5, "per_device_train_batch_size": 4}, 5, 50 / 3),
        (10, {"max_steps": 4, "per_device_train_batch_size": 8}, 4, 20),
    ],
)
def test_steps_and_hours_of_the_whole_training(
    make_trainer, target, samples, monkeypatch, rows, options, steps, trained_rows
):
    trainer = make_trainer(rows=(samples * 3)[:rows], save_strategy="no", **options)
    # A clock that goes on by an hour with every row.
    clock = [0.0]
    collate = trainer.data_collator

    def slow(batch):
        clock[0] += 3600 * len(batch)
        return collate(batch)

    trainer.data_collator = slow
    monkeypatch.setattr("sparrow_hf.training.preview.now", lambda device: clock[0])
    cost = estimate_cost(trainer, target)
    assert cost.seconds == pytest.approx(3600 * trained_rows)
    trainer.train()
    assert cost.optimizer_steps == steps == trainer.state.global_step


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"save_strategy": "epoch", "num_train_epochs": 3}, 3),
        ({"save_strategy": "epoch", "max_steps": 3}, 2),
        ({"save_steps": 0.1, "max_steps": 20}, 10),
        ({"save_steps": 0.1, "max_steps": 7}, 7),
        ({"save_steps": 5, "max_steps": 12}, 3),
        ({"save_steps": 4, "max_steps": 12}, 3),
        ({"save_steps": 500, "max_steps": 2}, 1),
        ({"save_steps": 2, "max_steps": 12, "save_total_limit": 10}, 6),
        ({"save_steps": 2, "max_steps": 12, "save_total_limit": 2}, 2),
        ({"save_steps": 2, "max_steps": 12, "save_total_limit": 0}, 6),
        ({"save_strategy": "no", "max_steps": 2}, 0),
    ],
)
def test_checkpoints_that_a_training_leaves(make_trainer, target, tmp_path, options, kept):
    trainer = make_trainer(per_device_train_batch_size=2, **options)
    cost = estimate_cost(trainer, target)
    trainer.train()
    assert cost.num_checkpoints == kept == len(list(tmp_path.glob("checkpoint-*")))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("save_only_model", [False, True])
def test_a_checkpoint_holds_the_frozen_weights_too(make_trainer, make_draft, target, tmp_path, lora, save_only_model):
    draft = make_draft()
    whole = sum(parameter.numel() for parameter in draft.parameters())
    if lora:
        add_lora(draft, 4)
    trainer = make_trainer(draft, max_steps=1, save_only_model=save_only_model)
    cost = estimate_cost(trainer, target)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    adapters = cost.draft_parameters if lora else 0
    averages = 0 if save_only_model else 2 * cost.draft_parameters
    assert cost.checkpoint_bytes == 4 * (whole + adapters + averages) == bytes_in(checkpoint)
    assert cost.training_bytes == 4 * (whole + adapters + 3 * cost.draft_parameters)


def bytes_in(checkpoint: Path) -> int:
    """Bytes of the weights and of the optimiser's averages in a checkpoint."""
    tensors = list(load_file(checkpoint / "model.safetensors").values())
    if (checkpoint / "optimizer.pt").exists():
        for state in torch.load(checkpoint / "optimizer.pt")["state"].values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
