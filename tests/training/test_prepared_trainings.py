"""A prepared training: which draft it trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import TrainingDataError, TrainingOptionsError
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.training import (
    DRAFT_PRESETS,
    DecodingCallback,
    SparrowDataCollator,
    SparrowTrainer,
    SparrowTrainingArguments,
)
from sparrow_hf.training.depth import was_chosen
from sparrow_hf.training.options import parse_options
from sparrow_hf.training.recording import record
from sparrow_hf.training.run import build_draft, check_best_metric, prepare_training


class OtherDraft(SparrowDraftModel):
    """A draft of another class."""


def test_a_draft_of_ones_own_is_trained_and_left_in_the_output(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path
) -> None:
    record(SparrowDraftModel.from_target(target), samples, tmp_path / "rows", SparrowDataCollator())
    words = (
        f"--target t --train {tmp_path}/rows --output {tmp_path}/draft --max-steps 1 --learning-rate 0.01 --use-cpu"
    )
    options, arguments = parse_options([*words.split(), "--report-to", "none", "--disable-tqdm", "true"])
    draft = build_draft(options, target, OtherDraft)
    assert type(draft) is OtherDraft
    before = draft.fc.weight.detach().clone()
    run = prepare_training(options, arguments, target, None, draft)  # type: ignore[arg-type]
    assert run.run() is draft and run.trainer.draft is draft
    assert not torch.equal(draft.fc.weight, before)
    assert torch.equal(OtherDraft.from_pretrained(tmp_path / "draft").fc.weight, draft.fc.weight)


def test_the_card_says_how_a_draft_was_trained(target: PreTrainedModel, samples: list[Any], tmp_path: Path) -> None:
    half = len(samples) // 2
    for name, rows in (("rows", samples[:half]), ("others", samples[half:])):
        record(SparrowDraftModel.from_target(target), rows, tmp_path / name, SparrowDataCollator())
    words = (
        f"--target t --train {tmp_path}/rows --held-out {tmp_path}/others --output {tmp_path}/draft --max-steps 2 "
        "--num-mtp-steps 2 --per-device-train-batch-size 2 --learning-rate 0.01 --save-steps 2 --use-cpu"
    )
    options, arguments = parse_options([*words.split(), "--report-to", "none", "--disable-tqdm", "true"])
    run = prepare_training(options, arguments, target, None)  # type: ignore[arg-type]
    run.run()
    draft = SparrowDraftModel.from_pretrained(tmp_path / "draft")
    assert draft.provenance["recipe"] == {
        "training rows": half,
        "steps": 2,
        "rows of a step": 2,
        "learning rate": "0.01, linear",
        "passes": 2,
        "losses": "1 × soft_cross_entropy, 0.2 × feature_smooth_l1",
        "visual tokens read": "0 … 64",
    }
    (row,) = draft.provenance["acceptance"]
    (tau,) = [entry["eval_tau"] for entry in run.trainer.state.log_history if "eval_tau" in entry]
    assert row["τ"] == f"{tau:.2f}" and row["P(k ≥ 1, 2, …)"].count(".") == 7
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "| `rows of a step` | 2 |" in card and row["τ"] in card and "not recorded" not in card


def test_a_warm_start_says_its_own_target_and_its_own_training(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SparrowDraftModel.from_target(target)
    record(first, samples, tmp_path / "rows", SparrowDataCollator())
    first.config.target_name_or_path, first.config.target_revision = "org/original", "1" * 40
    first.config.target_model_type = "qwen2_vl"
    first.config.set_tree_shape("chain-12")
    made = {"command": "retrain --steps 600", "commit": "0" * 40, "steps": 600, "tuned": {"shape": "chain-12"}}
    first.provenance = {**made, "acceptance": [{"τ": "5.58"}]}
    first.save_pretrained(tmp_path / "first")
    monkeypatch.setattr(target.config, "_name_or_path", "org/fine-tuned")
    monkeypatch.setattr(target.config, "_commit_hash", "2" * 40, raising=False)

    def train(output: str, start: str) -> SparrowDraftModel:
        words = f"--target t --train {tmp_path}/rows --output {tmp_path}/{output} --warm-start {tmp_path}/{start}"
        options, arguments = parse_options([*words.split(), *"--max-steps 1 --use-cpu --report-to none".split()])
        prepare_training(options, arguments, target, None).run()  # type: ignore[arg-type]
        return SparrowDraftModel.from_pretrained(tmp_path / output)

    with pytest.warns(UserWarning, match="was trained for 'org/original'"):
        draft = train("second", "first")
    config = draft.config
    assert (config.target_name_or_path, config.target_revision) == ("org/fine-tuned", "2" * 40)
    assert config.target_model_type == target.config.model_type
    assert draft.provenance.keys() == {
        *("warm_start", "vllm_positions", "recipe", "acceptance", "target", "target_revision", "saved_with")
    }
    assert draft.provenance["recipe"]["steps"] == 1 and draft.provenance["acceptance"] == []
    start = draft.provenance["warm_start"]
    assert start["from"] == "first" and start["target"] == "org/original" and made.items() <= start.items()
    card = (tmp_path / "second" / "README.md").read_text()
    assert "base_model: org/fine-tuned" in card and 'from_pretrained("org/fine-tuned")' in card
    assert "It was trained on from the draft `first`." in card and "| `steps` | 1 |" in card
    assert "org/original" not in card and "600" not in card and "5.58" not in card

    # Nothing was chosen without held-out rows: the depth is still the one that was chosen for the first draft.
    assert draft.config.num_draft_levels == 12 and was_chosen(draft.provenance)
    third = train("third", "second")
    assert third.provenance["warm_start"]["warm_start"]["steps"] == 600 and was_chosen(third.provenance)
    assert not was_chosen({"warm_start": {"from": "first"}})


def test_a_preset_is_applied_as_a_whole_or_not_at_all(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path
) -> None:
    for name, fields in (("other", {"num_mtp_steps": 5}), ("papers", DRAFT_PRESETS["paper"])):
        SparrowDraftModel.from_target(target, **fields).save_pretrained(tmp_path / name)
    words = f"--target t --train rows --output {tmp_path}/draft --preset paper --use-cpu --warm-start {tmp_path}"
    with pytest.raises(TrainingOptionsError) as refused:
        build_draft(parse_options(f"{words}/other".split())[0], target)
    assert str(refused.value) == (
        "--preset paper is a recipe for drafts of feature_layers [-1], num_mtp_steps 2, num_glimpse_tokens 0, but "
        f"{tmp_path}/other has feature_layers [1, 2, -1], num_mtp_steps 5, num_glimpse_tokens 64, and --warm-start "
        "keeps its draft's configuration: leave out --preset and give the options that you want, or train a new draft"
    )
    # A draft that was made by the preset is trained on by it.
    draft = build_draft(parse_options(f"{words}/papers".split())[0], target)
    assert (draft.config.num_mtp_steps, draft.config.num_glimpse_tokens) == (2, 0)


def test_by_default_a_seed_gives_the_same_draft_of_this_package(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path
) -> None:
    record(SparrowDraftModel.from_target(target), samples, tmp_path / "rows", SparrowDataCollator())
    drafts = []
    for name in ("a", "b"):
        words = f"--target t --train {tmp_path}/rows --output {tmp_path}/{name} --seed 3 --max-steps 1 --use-cpu"
        options, arguments = parse_options(words.split())
        drafts.append(prepare_training(options, arguments, target, None).trainer.draft)  # type: ignore[arg-type]
    assert type(drafts[0]) is SparrowDraftModel
    assert torch.equal(drafts[0].fc.weight, drafts[1].fc.weight)


def test_a_recording_is_not_streamed(target: PreTrainedModel, samples: list[Any], tmp_path: Path) -> None:
    record(SparrowDraftModel.from_target(target), samples[:1], tmp_path / "rows", SparrowDataCollator())
    words = f"--target t --train {tmp_path}/rows --output {tmp_path}/draft --max-steps 1 --use-cpu --streaming"
    with pytest.raises(TrainingOptionsError, match="--streaming: .* is a recording"):
        prepare_training(*parse_options(words.split()), target, None)  # type: ignore[arg-type]


def test_held_out_rows_that_cannot_be_evaluated_are_found_before_the_first_step(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path
) -> None:
    draft, half = SparrowDraftModel.from_target(target), len(samples) // 2
    # Without visual rows, which training does without and decoding does not.
    for name, rows in (("rows", samples[:half]), ("others", samples[half:])):
        record(draft, rows, tmp_path / name, SparrowDataCollator(), visual_rows=False)
    words = (
        f"--target t --train {tmp_path}/rows --held-out {tmp_path}/others --output {tmp_path}/draft --max-steps 2 "
        "--num-visual-rows-max 0 --use-cpu --report-to none --disable-tqdm true"
    ).split()

    def prepare(*further: str) -> Any:
        options, arguments = parse_options([*words, *further])
        return prepare_training(options, arguments, target, None)  # type: ignore[arg-type]

    run = prepare()
    with pytest.raises(TrainingDataError, match="held-out rows: the draft reads .* visual tokens"):
        run.run()
    assert run.trainer.state.global_step == 0
    prepare("--num-glimpse-tokens", "0").run()


def test_a_bad_held_out_conversation_is_found_before_the_first_step(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path
) -> None:
    record(SparrowDraftModel.from_target(target), samples, tmp_path / "rows", SparrowDataCollator())
    turns = [{"role": "user", "content": [{"type": "video", "video": "nowhere.mp4"}]}]
    row = {"messages": [*turns, {"role": "assistant", "content": "a red dot ."}]}
    (tmp_path / "others.jsonl").write_text(json.dumps(row) + "\n")
    words = (
        f"--target t --train {tmp_path}/rows --held-out {tmp_path}/others.jsonl --output {tmp_path}/draft "
        "--max-steps 2 --use-cpu --report-to none --disable-tqdm true"
    ).split()
    for further, said in (([], ""), (["--on-bad-row", "skip"], "not one of them can be used, for example: ")):
        run = prepare_training(*parse_options([*words, *further]), target, build_processor())
        with pytest.raises(TrainingDataError, match=f"^held-out rows: {said}row 0: There is no video file .*nowhere"):
            run.run()
        assert run.trainer.state.global_step == 0


@pytest.mark.parametrize("metric", ["decoded_tau", "eval_decoded_tau", "tao", "accepted_4"])
def test_a_figure_that_evaluations_have_not_chooses_no_checkpoint(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path, metric: str
) -> None:
    for name, rows in (("rows", samples[:2]), ("others", samples[2:])):
        record(SparrowDraftModel.from_target(target), rows, tmp_path / name, SparrowDataCollator())
    turns = [{"role": "user", "content": "a dot ?"}, {"role": "assistant", "content": "a red dot ."}]
    (tmp_path / "others.jsonl").write_text(json.dumps({"messages": turns}) + "\n")

    def prepare(metric: str, *words: object) -> Any:
        said = f"--target t --train {tmp_path}/rows --output {tmp_path}/draft --max-steps 2 --use-cpu --report-to none"
        said += f" --num-draft-levels 3 --held-out {tmp_path}/others --metric-for-best-model {metric}"
        options = parse_options([*said.split(), *map(str, words)])
        return prepare_training(*options, target, build_processor())

    with pytest.raises(TrainingOptionsError) as refused:
        prepare(metric)
    assert str(refused.value) == (
        f"--metric-for-best-model {metric}: evaluations on these held-out rows have no such figure, but accepted_1, "
        "accepted_2, accepted_3, agreement_1, agreement_2, agreement_3, k, loss, runtime, samples_per_second, "
        "steps_per_second, tau; a recording holds no videos to decode"
    )
    for known in ("tau", "eval_accepted_3", "agreement_1", "loss", "runtime"):
        prepare(known)
    prepare(metric, "--eval-strategy", "no")


def test_the_figures_that_may_choose_a_checkpoint_are_those_that_are_logged(
    target: PreTrainedModel, samples: list[Any], tmp_path: Path
) -> None:
    draft = SparrowDraftModel.from_target(target, num_draft_levels=3)
    arguments = SparrowTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", metric_for_best_model="tao", eval_strategy="steps"
    )
    trainer = SparrowTrainer(draft, target, arguments, eval_dataset=samples)
    decoding = DecodingCallback(trainer, samples[:1], max_new_tokens=6)
    trainer.add_callback(decoding)
    with pytest.raises(TrainingOptionsError) as refused:
        check_best_metric(trainer, decoding)
    told = str(refused.value).partition(", but ")[2].split(", ")
    logged = {name.removeprefix("eval_") for name in trainer.evaluate()} - {"model_preparation_time", "epoch"}
    assert logged == set(told)
    # Which figures one's own function has is known when it has run.
    trainer.compute_metrics = lambda prediction: {"tao": 1.0}
    check_best_metric(trainer, decoding)
