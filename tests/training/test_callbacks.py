"""Decoding held-out prompts while training: it agrees with the teacher-forced figures, and it disturbs nothing."""

import json
import math
import shutil

import pytest
import torch
from greedy import greedy
from transformers import EarlyStoppingCallback, TrainerCallback

from sparrow_hf import SparrowDraftModel, testbed
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.generation.emission import TokenEmitter
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.training import (
    SparrowTrainer,
    SparrowTrainingArguments,
    append_answer,
    callbacks,
)
from sparrow_hf.training.callbacks import DecodingCallback, decode
from sparrow_hf.video import prepare_inputs

LENGTH = 32


def make_trainer(folder, draft, target, rows, held_out, *, settings=None, **overrides):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_visual_rows_min": 4,
        "num_visual_rows_max": 4,
    }
    args = SparrowTrainingArguments(**(defaults | overrides))
    trainer = SparrowTrainer(draft, target, args, train_dataset=rows, eval_dataset=rows)
    if held_out:
        trainer.add_callback(DecodingCallback(trainer, held_out, **(settings or greedy(8))))
    return trainer


def weights_of(draft):
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


def assert_same_weights(first, second):
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_decoding_does_what_the_teacher_forced_walk_predicts(tmp_path):
    """On the shipped models, whose draft accepts enough for a wrong shift, mask or position to show."""
    target, processor, draft = testbed.load()
    rows = []
    for number, seed in enumerate(testbed.EVALUATION_SEEDS[:2]):
        clip = testbed.make_clip(tmp_path / f"{number}.mp4", seed, visual_tokens=32)
        prompt = prepare_inputs(processor, clip.messages)
        output = target.generate(**prompt, do_sample=False, max_new_tokens=LENGTH, assistant_model=draft)
        rows.append(append_answer(prompt, output[0, prompt["input_ids"].shape[1] :].tolist()))
    metrics = make_trainer(tmp_path, draft, target, rows, rows, settings={"max_new_tokens": LENGTH}).evaluate()
    assert metrics["eval_k"] > 2, "a draft that accepts nothing proves nothing"
    assert metrics["eval_decoded_tau"] == pytest.approx(metrics["eval_tau"], rel=0.05)
    assert metrics["eval_decoded_k"] == pytest.approx(metrics["eval_k"], rel=0.05)
    # Both walk through the same rounds, but the last token of a full-length answer is never drafted.
    rounds = len(rows) * (LENGTH - 1) / metrics["eval_decoded_tau"]
    for position in range(1, draft.config.num_draft_levels + 1):
        missing = metrics[f"eval_accepted_{position}"] - metrics[f"eval_decoded_accepted_{position}"]
        assert -1e-6 <= missing * rounds <= len(rows) + 1e-6
    assert metrics["eval_identical"] == 1.0 and metrics["eval_dsr"] > 0


def test_figures_of_one_call_by_hand(target, make_draft, prompts):
    draft = make_draft()
    figures = decode(draft, prompts[:1], greedy(12))
    stats = draft.last_generation
    assert figures["decoded_tau"] == pytest.approx(11 / stats.rounds)
    assert figures["decoded_k"] == stats.k
    levels = draft.config.num_draft_levels
    assert [figures[f"decoded_accepted_{j}"] for j in range(1, levels + 1)] == stats.per_position
    # One token is the prefill's own: nothing was decoded, so there is no speed to compare.
    assert "dsr" not in decode(draft, prompts[:1], greedy(1))


def test_a_token_that_is_not_the_targets_is_found(target, make_draft, prompts, monkeypatch):
    right = TokenEmitter.choose
    monkeypatch.setattr(TokenEmitter, "choose", lambda self, *args: (right(self, *args) + 1) % 100)
    assert decode(make_draft(), prompts[:2], greedy(6))["identical"] == 0.0


def test_training_goes_on_as_without_it(tmp_path, target, make_draft, samples):
    """Dropout draws from the stream that sampling would draw from."""
    sampled = greedy(6) | {"do_sample": True}
    settings = {"max_steps": 3, "eval_steps": 1}
    drafts = []
    for name, held_out in (("without", []), ("with", samples[:1])):
        draft = make_draft(attention_dropout=0.3)
        make_trainer(tmp_path / name, draft, target, samples, held_out, settings=sampled, **settings).train()
        drafts.append(weights_of(draft))
    assert_same_weights(*drafts)


def test_a_resumed_run_with_it_ends_with_the_same_weights(tmp_path, target, make_draft, samples):
    settings = {"max_steps": 3, "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    sampled = greedy(6) | {"do_sample": True}
    whole = make_draft(attention_dropout=0.3)
    make_trainer(tmp_path, whole, target, samples, samples[:1], settings=sampled, **settings).train()
    resumed = make_draft(seed=1, attention_dropout=0.3)
    trainer = make_trainer(tmp_path, resumed, target, samples, samples[:1], settings=sampled, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights_of(whole), weights_of(resumed))


def test_the_best_checkpoint_by_tau_is_kept(tmp_path, target, make_draft, samples, monkeypatch):
    measured = iter([1.2, 1.9, 1.4])
    monkeypatch.setattr(callbacks, "decode", lambda *args: {"decoded_tau": next(measured)})
    draft = make_draft()
    best = {"metric_for_best_model": "decoded_tau", "load_best_model_at_end": True}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer = make_trainer(tmp_path, draft, target, samples, samples[:1], max_steps=3, **saving, **best)
    trainer.train()
    assert trainer.state.best_metric == 1.9
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    kept = SparrowDraftModel.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_weights(weights_of(kept), weights_of(draft))


def test_early_stopping_goes_by_what_is_decoded_whatever_was_added_first(
    tmp_path, target, make_draft, samples, monkeypatch
):
    measured = iter([1.9, 1.2, 1.4])
    monkeypatch.setattr(callbacks, "decode", lambda *args: {"decoded_tau": next(measured)})
    best = {"metric_for_best_model": "decoded_tau", "load_best_model_at_end": True}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer = make_trainer(tmp_path, make_draft(), target, samples, [], max_steps=3, **saving, **best)
    trainer.add_callback(EarlyStoppingCallback(1))
    trainer.add_callback(DecodingCallback(trainer, samples[:1]))
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_metric) == (2, 1.9)


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_the_best_checkpoint_is_found_where_the_folder_is_now(tmp_path, target, make_draft, samples, monkeypatch, how):
    def train(folder, resume=None):
        best = {"metric_for_best_model": "decoded_tau", "load_best_model_at_end": True}
        saving = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
        trainer = make_trainer(folder, make_draft(), target, samples, samples[:1], max_steps=2, **saving, **best)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    measured = iter([1.9, 1.2])
    monkeypatch.setattr(callbacks, "decode", lambda *args: {"decoded_tau": next(measured)})
    whole = weights_of(train(tmp_path / "first").draft)
    (shutil.move if how == "moved" else shutil.copytree)(tmp_path / "first", tmp_path / "second")
    resumed = train(tmp_path / "second", resume=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "second" / "checkpoint-1")
    assert_same_weights(weights_of(resumed.draft), whole)


def test_every_tracker_gets_plain_numbers(tmp_path, target, make_draft, samples):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, make_draft(), target, samples, samples[:2], max_steps=2)
    trainer.add_callback(Tracker())
    trainer.train()
    names = {name for logs in seen for name in logs}
    assert {"loss", "loss_4", "agreement_4", "eval_tau", "eval_decoded_tau", "eval_dsr", "eval_identical"} <= names
    assert {type(value) for logs in seen for value in logs.values()} <= {int, float}
    assert json.loads(json.dumps(seen)) == seen
    assert any("eval_decoded_tau" in entry and entry["step"] == 2 for entry in trainer.state.log_history)


def test_an_interruption_leaves_everything_as_it_was(target, make_draft, prompts, monkeypatch):
    def interrupt(self, *args):
        modes.append(draft.training)
        raise KeyboardInterrupt

    draft, modes = make_draft().train(), []
    before = torch.random.get_rng_state()
    hooks = len(target._forward_pre_hooks)
    monkeypatch.setattr(TokenEmitter, "choose", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(draft, prompts, greedy(6))
    assert modes == [False] and draft.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(target._forward_pre_hooks) == hooks


def test_only_the_main_process_generates(tmp_path, target, make_draft, samples, monkeypatch):
    trainer = make_trainer(tmp_path, make_draft(), target, samples, samples[:1])
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, DecodingCallback))
    monkeypatch.setattr(SparrowTrainingArguments, "world_size", 2)
    monkeypatch.setattr(callbacks, "decode", lambda *args: pytest.fail("this is not the main process"))
    monkeypatch.setattr(callbacks, "broadcast_object_list", lambda figures: figures.__setitem__(0, {"dsr": 2.0}))
    trainer.state.is_world_process_zero = False
    metrics = {"eval_tau": 1.0}
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    assert metrics == {"eval_tau": 1.0, "eval_dsr": 2.0}


def test_bad_held_out_rows_are_left_out_if_training_leaves_them_out(tmp_path, target, make_draft, samples, recorded):
    def evaluate(*rows, **settings):
        trainer = make_trainer(tmp_path, make_draft(), target, samples, rows, **settings)
        trainer.data_collator.processor = build_processor()
        return trainer.evaluate(), trainer.skipped_rows

    bad = {"messages": [], "row_index": 7}
    with pytest.raises(TrainingDataError, match="row 7: 'messages' must be"):
        evaluate(bad)
    for rows, decoded in (([bad], False), ([bad, samples[0]], True)):
        metrics, skipped = evaluate(*rows, on_bad_row="skip")
        assert ("eval_decoded_tau" in metrics) is decoded
        assert [index for index, _ in skipped] == [7]
    # A row without pixels is a mistake of the caller, and not a bad row.
    with pytest.raises(TrainingDataError, match="holds no pixels"):
        evaluate(recorded[0], on_bad_row="skip")


def test_held_out_rows_that_are_all_left_out_are_an_error_that_loses_no_step(tmp_path, target, make_draft, samples):
    bad = {"messages": [], "row_index": 7}
    trainer = make_trainer(
        tmp_path, make_draft(), target, samples, [], on_bad_row="skip", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, metric_for_best_model="tau", load_best_model_at_end=True, max_steps=2,
    )  # fmt: skip
    trainer.eval_dataset = [bad]
    trainer.data_collator.processor = build_processor()
    with pytest.raises(TrainingDataError, match="rows to evaluate: not one of them can be used, for example: row 7"):
        trainer.evaluate()
    trainer.train()
    assert trainer.state.global_step == 2
    found = [entry["eval_tau"] for entry in trainer.state.log_history if "eval_tau" in entry]
    assert len(found) == 2 and all(map(math.isnan, found))


def test_no_held_out_row_is_refused(tmp_path, target, make_draft, samples):
    with pytest.raises(TrainingDataError, match="at least one"):
        DecodingCallback(make_trainer(tmp_path, make_draft(), target, samples, []), [])
