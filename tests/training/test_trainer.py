"""The trainer: both data paths agree, resume is exact, only the draft is saved, one sample can be overfitted."""

import copy
import math
import shutil

import pytest
import torch
from greedy import greedy
from kills import die, kill_this_process
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import BindingError, TrainingDataError
from sparrow_hf.generation.candidate_generator import SparrowCandidateGenerator
from sparrow_hf.training import (
    ALL_VISUAL_ROWS,
    TRAINING_PRESETS,
    SparrowDataCollator,
    SparrowTrainer,
    SparrowTrainingArguments,
    TrainingStates,
    append_answer,
    read_with_target,
)
from sparrow_hf.training.checkpoints import last_checkpoint


def arguments(folder, **overrides):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "num_visual_rows_max": 6,
    }
    return SparrowTrainingArguments(**(defaults | overrides))


def weights_of(draft):
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    "recipe",
    [
        {"hidden_state_noise": 0.2},
        {"num_visual_rows_min": ALL_VISUAL_ROWS, "num_visual_rows_max": ALL_VISUAL_ROWS, "mtp_attention": "reinput"},
        {"num_visual_rows_max": 0},
    ],
    ids=["glimpse-noise", "paper", "text-only"],
)
@pytest.mark.parametrize("overrides", [{}, {"feature_layers": [2, 3, -1]}], ids=["bridge-apart", "bridge-is-feature"])
def test_recorded_states_give_the_losses_of_training_on_the_fly(
    tmp_path, target, make_draft, samples, recorded, recipe, overrides
):
    draft = make_draft(**overrides)
    recorded = [read_with_target(draft, sample).to_row() for sample in samples]
    trainer = SparrowTrainer(draft, target, arguments(tmp_path, **recipe))
    losses, gradients = [], []
    for rows in (samples, recorded):
        draft.train().zero_grad()
        trainer.state.global_step = 3
        loss = trainer.compute_loss(draft, trainer.data_collator(rows))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(draft.fc.weight.grad.clone())
    assert torch.equal(*losses) and torch.equal(*gradients)
    trainer.state.global_step = 4
    if recipe.get("num_visual_rows_max") not in (0, ALL_VISUAL_ROWS):
        assert not torch.equal(losses[0], trainer.compute_loss(draft, trainer.data_collator(recorded)))


@pytest.mark.parametrize("spacing", ["even", "logarithmic"])
def test_decoding_and_evaluation_read_the_glimpse_that_the_draft_says(tmp_path, target, make_draft, samples, spacing):
    draft = make_draft(glimpse_spacing=spacing)
    batch = SparrowTrainer(draft, target, arguments(tmp_path)).make_batch(samples, training=False)
    kept = SparrowCandidateGenerator(draft, samples[-1]["input_ids"][:, : samples[-1]["answer_start"]]).positions
    first = int(torch.isin(samples[-1]["input_ids"][0], torch.tensor(draft.config.visual_token_ids)).nonzero()[0])
    # 40 visual tokens: the middles of four tenths, or 0.8·(e^(k/0.8) − 1).
    assert (kept.visual - first).tolist() == {"even": [5, 15, 25, 35], "logarithmic": [0, 1, 8, 33]}[spacing]
    everything = read_with_target(draft, samples[-1])
    expected = everything.visual_states[torch.isin(everything.visual_rows, kept.visual)]
    torch.testing.assert_close(batch.visual_states[-1], expected)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, target, make_draft, recorded):
    settings = {"max_steps": 6, "hidden_state_noise": 0.2, "save_strategy": "steps", "save_steps": 3}
    whole = make_draft()
    SparrowTrainer(whole, target, arguments(tmp_path / "a", **settings), train_dataset=recorded).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    interrupted = make_draft()
    SparrowTrainer(
        interrupted, target, arguments(tmp_path / "b", **settings), train_dataset=recorded, callbacks=[Stop()]
    ).train()
    shutil.rmtree(tmp_path / "b" / "checkpoint-4", ignore_errors=True)
    resumed = make_draft(seed=1)
    trainer = SparrowTrainer(resumed, target, arguments(tmp_path / "b", **settings), train_dataset=recorded)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert_same_weights(weights_of(resumed), weights_of(whole))


class _Die(TrainerCallback):
    """Kills the process at the third step, or in the middle of the second checkpoint."""

    def __init__(self, while_saving):
        self.while_saving = while_saving

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4 and self.while_saving:
            # The trainer's state is what is written last.
            TrainerState.save_to_json = lambda self, path: kill_this_process()
        if state.global_step == 3 and not self.while_saving:
            kill_this_process()


@pytest.mark.parametrize("while_saving", [False, True], ids=["between-steps", "while-saving"])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, target, make_draft, recorded, while_saving):
    def train(name, callbacks=(), resume=None):
        args = arguments(tmp_path / name, max_steps=5, save_strategy="steps", save_steps=2, hidden_state_noise=0.1)
        trainer = SparrowTrainer(make_draft(), target, args, train_dataset=recorded, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(trainer.draft)

    whole = train("whole")
    die(lambda: train("killed", [_Die(while_saving)]))
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint == str(tmp_path / "killed" / "checkpoint-2")
    assert (tmp_path / "killed" / "checkpoint-4").exists() == while_saving
    assert_same_weights(train("killed", resume=checkpoint), whole)


def test_a_bf16_target_and_an_fp32_draft(tmp_path, target, make_draft, samples):
    low = copy.deepcopy(target).to(torch.bfloat16)
    draft = make_draft().to(torch.float32)
    draft.bind(low)
    args = arguments(tmp_path, max_steps=2, hidden_state_noise=0.1)
    trainer = SparrowTrainer(draft, low, args, train_dataset=samples, eval_dataset=samples)
    before = weights_of(draft)
    trainer.train()
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert not torch.equal(before["fc.weight"], draft.fc.weight)
    assert trainer.evaluate()["eval_tau"] >= 1


def test_accumulated_batches_equal_one_large_batch(tmp_path, target, make_draft, recorded):
    """Samples differ in length, so a mean of means would not do."""
    results = []
    for size, steps in ((4, 1), (1, 4)):
        draft = make_draft().double()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        rows = [dict(row) for row in recorded]
        args = arguments(tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0, **settings)
        trainer = SparrowTrainer(draft, target, args, train_dataset=rows)
        trainer.train()
        results.append((weights_of(draft), trainer.state.log_history[0]["loss"]))
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(tensor, results[1][0][name], rtol=1e-6, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_only_draft_tensors_are_saved_and_the_target_is_untouched(tmp_path, target, make_draft, recorded):
    before = weights_of(target)
    draft = make_draft()
    trainer = SparrowTrainer(draft, target, arguments(tmp_path, max_steps=2), train_dataset=recorded)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == {name for name, _ in draft.named_parameters()}
    assert not any("embed" in name or "head" in name for name in stored)
    assert_same_weights(before, weights_of(target))
    assert not target.training and not any(parameter.requires_grad for parameter in target.parameters())
    loaded = SparrowDraftModel.from_pretrained(tmp_path / "out")
    assert_same_weights(weights_of(loaded), weights_of(draft))
    assert not torch.equal(draft.fc.weight, make_draft().fc.weight)


def test_one_sample_can_be_overfitted(tmp_path, target, prompts):
    """Groundwork of the overfit gate: any error of shift, mask or position keeps some pass below 1."""
    target = copy.deepcopy(target)
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(4)  # of two nearly equal tokens a draft may learn either
    answer = target.generate(**prompts[1], **greedy(12))[0, prompts[1]["input_ids"].shape[1] :].tolist()
    row = append_answer(prompts[1], answer)
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target, num_glimpse_tokens=4, num_mtp_steps=4, num_draft_levels=4)
    for parameter in draft.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    settings = {"max_steps": 300, "per_device_train_batch_size": 1, "logging_steps": 300, "learning_rate": 5e-3}
    args = arguments(tmp_path, num_visual_rows_min=4, num_visual_rows_max=4, **settings)
    trainer = SparrowTrainer(draft, target, args, train_dataset=[row], eval_dataset=[row])
    trainer.train()
    metrics = trainer.evaluate()
    assert [metrics[f"eval_agreement_{step}"] for step in range(1, 5)] == [1.0] * 4
    # 12 answer tokens in rounds of 5, 5 and the last 2
    assert metrics["eval_tau"] == pytest.approx(12 / 3)
    assert "loss_4" in trainer.state.log_history[0] and "agreement_4" in trainer.state.log_history[0]

    prompt = {name: value for name, value in row.items() if name != "answer_start"}
    start = row["answer_start"]
    for name, value in prompt.items():
        if value.shape == row["input_ids"].shape:
            prompt[name] = value[:, :start]
    draft.config.num_tree_nodes = 5
    output = target.generate(**prompt, assistant_model=draft, **greedy(12))
    assert output[0, start:].tolist() == row["input_ids"][0, start:].tolist()
    stats = draft.last_generation
    assert stats.accepted[:2] == [4, 4], stats.accepted


def test_a_draft_of_another_target_is_refused(tmp_path, target, make_draft):
    from sparrow_hf import SparrowDraftConfig

    config = SparrowDraftConfig.from_target_config(target.config)
    config.vocab_size += 1
    with pytest.raises(BindingError, match="vocab_size"):
        SparrowTrainer(SparrowDraftModel(config), target, arguments(tmp_path))


def test_bad_samples_are_refused(tmp_path, target, make_draft, samples):
    trainer = SparrowTrainer(make_draft(), target, arguments(tmp_path))
    blind = {name: value for name, value in samples[0].items() if not name.startswith("pixel_values")}
    length = samples[0]["input_ids"].shape[1]
    for bad, message in (
        (blind, "no pixel values"),
        (samples[0] | {"answer_start": length - 1}, "at least 2 tokens"),
        (samples[0] | {"answer_start": 3}, "placeholders"),
    ):
        with pytest.raises(TrainingDataError, match=message):
            trainer.make_batch([bad], training=True)
    with pytest.raises(TrainingDataError, match="needs 'messages'"):
        SparrowDataCollator()([{"text": "x"}])
    with pytest.raises(TrainingDataError, match="processor"):
        SparrowDataCollator()([{"messages": []}])


def test_states_survive_the_collator(recorded):
    states = TrainingStates.from_row(recorded[0])
    (row,) = SparrowDataCollator()([states])["samples"]
    assert row["text_states"] is states.text_states and row["answer_start"] == states.answer_start


@pytest.mark.parametrize(
    "bad",
    [
        {"num_visual_rows_min": 9, "num_visual_rows_max": 3},
        {"num_visual_rows_min": -1, "num_visual_rows_max": 3},
        {"soft_cross_entropy_weight": 0.0, "feature_smooth_l1_weight": 0.0},
        {"list_mle_weight": -1.0},
        {"mtp_attention": "other"},
        {"remove_unused_columns": True},
    ],
)
def test_contradicting_arguments_are_refused(tmp_path, bad):
    with pytest.raises(ValueError):
        arguments(tmp_path, **bad)


def test_presets(tmp_path):
    paper = arguments(tmp_path, **TRAINING_PRESETS["paper"])
    assert (paper.mtp_attention, paper.num_visual_rows_min, paper.num_visual_rows_max) == ("reinput", -1, -1)
    assert paper.loss_weights == {
        "soft_cross_entropy": 0.0,
        "probability_l1": 10.0,
        "list_mle": 0.1,
        "feature_smooth_l1": 0.0,
    }
    assert paper.learning_rate == 3e-5 and paper.adam_beta2 == 0.95


def test_the_drafts_own_card_stays(tmp_path, target, make_draft, samples):
    trainer = SparrowTrainer(make_draft(), target, arguments(tmp_path), train_dataset=samples)
    trainer.save_model(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "SparrowDraftModel" in card
    trainer.create_model_card(model_name="draft")
    assert (tmp_path / "README.md").read_text() == card


def test_a_draft_that_is_trained_on_is_not_told_by_its_earlier_training(tmp_path, target, make_draft, samples):
    first = make_draft()
    first.provenance = {"recipe": {"steps": 600}, "acceptance": [{"τ": "5.58"}], "data": "ours"}
    first.save_pretrained(tmp_path / "first")
    draft = SparrowDraftModel.from_pretrained(tmp_path / "first")
    trainer = SparrowTrainer(draft, target, arguments(tmp_path, max_steps=1), train_dataset=samples)
    trainer.train()
    trainer.save_model(str(tmp_path / "second"))
    start = SparrowDraftModel.from_pretrained(tmp_path / "second").provenance["warm_start"]
    assert start["recipe"] == {"steps": 600} and start["data"] == "ours" and start["from"] == "first"
    card = (tmp_path / "second" / "README.md").read_text()
    assert "trained on from the draft `first`" in card and "600" not in card and "5.58" not in card


@pytest.mark.parametrize("told", [{"data": "ours"}, {"recipe": {"captions": "ours"}}])
def test_what_a_user_tells_of_a_fresh_draft_stays(tmp_path, target, make_draft, samples, told):
    draft = make_draft()
    draft.provenance = told
    SparrowTrainer(draft, target, arguments(tmp_path, max_steps=1), train_dataset=samples).train()
    assert draft.provenance == told
