"""Resuming a training: every part of a checkpoint is the one that was written, and the training is the same."""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from sparrow_hf import SparrowDraftModel, targets
from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.checksums import DIGESTS_FILE, Digests
from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.training import SparrowDataCollator, SparrowTrainer, SparrowTrainingArguments, checkpoints
from sparrow_hf.training import run as runs
from sparrow_hf.training.checkpoints import SETTINGS_FILE, check_checkpoint, check_settings, last_checkpoint
from sparrow_hf.training.options import parse_options
from sparrow_hf.training.recording import record
from sparrow_hf.training.run import TrainingRun, prepare_training

SMALL = ("--max-steps", "2", "--save-steps", "1", "--learning-rate", "0.01", "--use-cpu", "--report-to", "none",
         "--disable-tqdm", "true", "--num-glimpse-tokens", "4", "--per-device-train-batch-size", "2")  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, samples: list[Any]) -> Path:
    """Recordings of the same target: two of the same rows in another order, and one of other rows."""
    folder = tmp_path_factory.mktemp("rows")
    draft = SparrowDraftModel.from_target(target)
    record(draft, samples, folder / "a", SparrowDataCollator())
    record(draft, list(reversed(samples)), folder / "b", SparrowDataCollator())
    # The same videos and questions, and shorter answers.
    record(draft, [shortened(sample) for sample in samples[:2]], folder / "c", SparrowDataCollator())
    return folder


def shortened(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample without the last token of its answer."""
    shape = sample["input_ids"].shape
    return {name: value[:, :-1] if getattr(value, "shape", None) == shape else value for name, value in sample.items()}


@pytest.fixture(scope="module")
def prepare(rows: Path, target: PreTrainedModel) -> Callable[..., TrainingRun]:
    """Prepares a training as `sparrow train` does; what is said later counts."""

    def run(output: Path, *words: object, model: PreTrainedModel = target, recording: str = "a") -> TrainingRun:
        where = ("--target", "t", "--train", rows / recording, "--output", output)
        options, arguments = parse_options([str(word) for word in (*where, *SMALL, *words)])
        return prepare_training(options, arguments, model, None)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def trained(prepare: Callable[..., TrainingRun], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training with checkpoints after steps 1 and 2, and another one of another seed beside it."""
    folder = tmp_path_factory.mktemp("trained")
    for name, seed in (("a", 42), ("b", 1)):
        prepare(folder / name, "--seed", seed).run()
    return folder


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "a", tmp_path / "a"))


PARTS = (
    "model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "training_args.bin", "training.json", "README.md", "PROVENANCE.json", "digests.sha256",
)  # fmt: skip


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    "flipped": lambda path, other: path.write_bytes(flip(path.read_bytes())),
    "truncated": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, other: os.truncate(path, 0),
    "missing": lambda path, other: path.unlink(),
    "of another run": lambda path, other: shutil.copy(other, path),
}


def test_the_parts_are_all_there_are(trained: Path) -> None:
    for name in ("a", "b"):
        checkpoint = trained / name / "checkpoints" / "checkpoint-2"
        assert {path.name for path in checkpoint.iterdir()} == set(PARTS)
        check_checkpoint(checkpoint, ("optimizer.pt", "scheduler.pt", "rng_state.pth"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_is_refused_by_name(output: Path, trained: Path, part: str, damage: str) -> None:
    checkpoint, other = (folder / "checkpoints" / "checkpoint-2" for folder in (output, trained / "b"))
    before = (checkpoint / part).read_bytes()
    DAMAGES[damage](checkpoint / part, other / part)
    if (checkpoint / part).exists() and (checkpoint / part).read_bytes() == before:
        check_checkpoint(checkpoint)
        return
    # A checkpoint with such a part is not passed over for an older one: what is wrong is said.
    assert last_checkpoint(output / "checkpoints") == str(checkpoint)
    with pytest.raises(TrainingOptionsError) as caught:
        check_checkpoint(checkpoint)
    named = str(caught.value)
    assert (part in named or part == "digests.sha256") and "delete the folder" in named and "\n" not in named


@pytest.mark.parametrize("part", ["optimizer.pt", "training.json"])
def test_a_damaged_part_ends_the_resumed_training(
    prepare: Callable[..., TrainingRun], output: Path, part: str
) -> None:
    path = output / "checkpoints" / "checkpoint-2" / part
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(TrainingOptionsError, match=f"{part} is not the file that was written"):
        prepare(output, "--resume").run()
    # The remedy holds: the checkpoint before it leads to the same draft.
    whole = SparrowDraftModel.from_pretrained(output).state_dict()
    shutil.rmtree(path.parent)
    again = prepare(output, "--resume").run().state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_weights_alone_are_started_from(prepare: Callable[..., TrainingRun], tmp_path: Path) -> None:
    prepare(tmp_path / "a", "--save-only-model", "true").run()
    with pytest.raises(TrainingOptionsError) as caught:
        prepare(tmp_path / "a", "--resume").run()
    checkpoint = tmp_path / "a" / "checkpoints" / "checkpoint-2"
    assert f"--warm-start {checkpoint} and another --output" in str(caught.value)
    assert "delete" not in str(caught.value)
    assert SparrowDraftModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--learning-rate", 0.02), "arguments.learning_rate: 0.01, now 0.02"),
        (("--seed", 7), "arguments.seed: 42, now 7"),
        (("--per-device-train-batch-size", 1), "arguments.per_device_train_batch_size: 2, now 1"),
        (("--gradient-accumulation-steps", 2), "arguments.gradient_accumulation_steps: 1, now 2"),
        (("--lr-scheduler-type", "cosine"), "arguments.lr_scheduler_type: 'linear', now 'cosine'"),
        (("--hidden-state-noise", 0.5), "arguments.hidden_state_noise: 0.0, now 0.5"),
        (("--ignore-data-skip", "true"), "arguments.ignore_data_skip: False, now True"),
        (("--num-mtp-steps", 2), "draft.num_mtp_steps: 4, now 2"),
        (("--draft-dtype", "bfloat16"), "draft_dtype: 'torch.float32', now 'torch.bfloat16'"),
    ],
)
def test_other_options_are_refused_by_name(
    prepare: Callable[..., TrainingRun], tmp_path: Path, words: tuple[Any, ...], named: str
) -> None:
    prepare(tmp_path, "--max-steps", 1).run()
    with pytest.raises(TrainingOptionsError) as caught:
        prepare(tmp_path, *words, "--resume")
    assert named in str(caught.value) and "--warm-start" in str(caught.value)


def test_other_rows_another_target_and_processor_are_refused(
    prepare: Callable[..., TrainingRun], output: Path, target: PreTrainedModel
) -> None:
    with pytest.raises(TrainingOptionsError, match="train: '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
        prepare(output, "--resume", recording="b")
    with pytest.raises(TrainingOptionsError, match="processor: None, now 'another'"):
        prepare(output, "--resume", "--processor", "another")
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.get_output_embeddings().weight[0] += 1
    with pytest.raises(TrainingOptionsError, match="target_sha256: '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
        check_settings(output / "checkpoints" / "checkpoint-2", {"target_sha256": tensor_digest(other.state_dict())})


def test_what_decides_no_weights_may_change(prepare: Callable[..., TrainingRun], output: Path) -> None:
    prepare(output, "--resume", "--logging-steps", 1, "--save-total-limit", 3, "--run-name", "again")
    # A bad row has stopped the training.
    prepare(output, "--resume", "--on-bad-row", "skip")
    with pytest.warns(UserWarning, match="planned for .*'max_steps': 2.* goes on with .*'max_steps': 3"):
        prepare(output, "--resume", "--max-steps", 3)


def test_how_a_draft_decodes_and_is_evaluated_may_change(
    prepare: Callable[..., TrainingRun], output: Path, rows: Path
) -> None:
    whole = SparrowDraftModel.from_pretrained(output).state_dict()
    shutil.rmtree(output / "checkpoints" / "checkpoint-2")
    words = ("--num-draft-levels", 5, "--num-glimpse-tokens", 8, "--glimpse-spacing", "logarithmic")
    again = prepare(output, "--resume", "--held-out", rows / "c", *words).run()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.items())
    config = SparrowDraftModel.from_pretrained(output).config
    assert (config.tree_shape, config.num_glimpse_tokens, config.glimpse_spacing) == ((6, 5, 1), 8, "logarithmic")


def test_held_out_rows_may_join_a_training_that_began_with_a_tuned_draft(
    target: PreTrainedModel, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = SparrowDraftModel.from_target(target, num_draft_levels=12)
    tuned.provenance = {"tuned": {"shape": "chain-12"}}
    tuned.save_pretrained(tmp_path / "tuned")
    common = f"--target t --train {rows}/a --output {tmp_path}/draft --warm-start {tmp_path}/tuned --use-cpu "
    common += "--save-steps 1 --report-to none --disable-tqdm true"
    first = prepare_training(*parse_options([*common.split(), "--max-steps", "1"]), target, None)
    first.run()
    assert first.trainer.draft.config.num_draft_levels == 12
    # The target lies elsewhere now; its weights are the same.
    monkeypatch.setattr(target.config, "_name_or_path", "org/renamed")
    words = [*common.split(), "--max-steps", "2", "--resume", "--held-out", f"{rows}/c"]
    with pytest.warns(UserWarning, match="planned for"):
        second = prepare_training(*parse_options(words), target, None)
    assert second.chooses_depth and second.trainer.draft.config.num_draft_levels == 7
    second.run()
    assert second.trainer.state.global_step == 2


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_a_warning(
    prepare: Callable[..., TrainingRun], output: Path
) -> None:
    checkpoint = output / "checkpoints" / "checkpoint-2"
    shutil.rmtree(checkpoint)
    checkpoint = output / "checkpoints" / "checkpoint-1"
    for name in ("training.json", "digests.sha256"):
        (checkpoint / name).unlink()
    whole = SparrowDraftModel.from_pretrained(output).state_dict()
    with pytest.warns(UserWarning, match="carries no digests"):
        again = prepare(output, "--resume").run().state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    (checkpoint / "optimizer.pt").unlink()
    shutil.rmtree(checkpoint.with_name("checkpoint-2"))
    with pytest.raises(TrainingOptionsError, match=r"optimizer\.pt is missing"), pytest.warns(UserWarning):
        prepare(output, "--resume").run()


def test_a_trainer_in_python_checks_too(
    output: Path, target: PreTrainedModel, make_draft: Callable[..., SparrowDraftModel], recorded: list[Any]
) -> None:
    args = SparrowTrainingArguments(output_dir=str(output / "checkpoints"), use_cpu=True, report_to="none")
    trainer = SparrowTrainer(make_draft(), target, args, train_dataset=recorded)
    path = output / "checkpoints" / "checkpoint-2" / "scheduler.pt"
    path.write_bytes(flip(path.read_bytes()))
    for checkpoint in (True, str(path.parent)):
        with pytest.raises(TrainingOptionsError, match=r"scheduler\.pt is not the file"):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_a_training_that_logs_nothing_has_a_draft_and_no_curves(
    prepare: Callable[..., TrainingRun], tmp_path: Path
) -> None:
    run = prepare(tmp_path, "--logging-steps", 5)
    run.run()
    assert SparrowDraftModel.from_pretrained(tmp_path) and not (tmp_path / "curves.png").exists()
    assert run.notes == ["There are no curves: nothing was logged in 2 steps (--logging-steps 5)."]


@pytest.mark.parametrize("left", ["nothing", "digests", "settings", "settings and half a line"])
def test_a_stop_while_a_checkpoint_is_sealed_leaves_one_that_is_resumed(
    prepare: Callable[..., TrainingRun], output: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    whole = SparrowDraftModel.from_pretrained(output).state_dict()
    folder = output / "checkpoints"
    settings = json.loads((folder / "checkpoint-1" / SETTINGS_FILE).read_text())
    shutil.rmtree(folder / "checkpoint-2")
    for name in (SETTINGS_FILE, DIGESTS_FILE):
        (folder / "checkpoint-1" / name).unlink()

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    where = {"nothing": (Digests, "write"), "digests": (checkpoints, "write_json")}.get(left, (Digests, "add"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, stop)
        checkpoints.seal_checkpoint(folder / "checkpoint-1", settings)
    if left == "settings and half a line":
        with (folder / "checkpoint-1" / DIGESTS_FILE).open("a") as file:
            file.write("0123")
    there = {path.name for path in (folder / "checkpoint-1").iterdir()} & {SETTINGS_FILE, DIGESTS_FILE}
    assert there == {"nothing": set(), "digests": {DIGESTS_FILE}}.get(left, {SETTINGS_FILE, DIGESTS_FILE})

    said = {"nothing": "carries no digests", "digests": "nothing tells whether these are the options"}.get(left)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = prepare(output, "--resume").run().state_dict()
    told = [str(warning.message) for warning in caught if "checkpoint-1" in str(warning.message)]
    assert len(told) == (said is not None) and all(said in message for message in told if said)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_settings_that_a_stop_left_without_a_digest_are_compared(
    prepare: Callable[..., TrainingRun], output: Path
) -> None:
    digests = output / "checkpoints" / "checkpoint-2" / DIGESTS_FILE
    *lines, last = digests.read_text().splitlines(keepends=True)
    assert last.endswith(f"  {SETTINGS_FILE}\n")
    digests.write_text("".join(lines))
    with pytest.raises(TrainingOptionsError, match="seed: 42, now 7"):
        prepare(output, "--resume", "--seed", 7)


def test_arguments_of_another_version_of_transformers_are_not_compared(
    prepare: Callable[..., TrainingRun], output: Path
) -> None:
    path = output / "checkpoints" / "checkpoint-2" / SETTINGS_FILE
    settings = json.loads(path.read_text())
    settings["arguments"]["an_argument_of_then"] = 1
    del settings["arguments"]["weight_decay"]
    checkpoints.seal_checkpoint(path.parent, settings)
    prepare(output, "--resume")


@pytest.mark.parametrize("steps", [4, 2])
def test_a_field_that_an_earlier_version_had_not_was_the_default(
    prepare: Callable[..., TrainingRun], tmp_path: Path, steps: int
) -> None:
    prepare(tmp_path, "--num-mtp-steps", steps).run()
    path = tmp_path / "checkpoints" / "checkpoint-2" / SETTINGS_FILE
    settings = json.loads(path.read_text())
    del settings["draft"]["num_mtp_steps"]
    checkpoints.seal_checkpoint(path.parent, settings)
    outcome = nullcontext() if steps == 4 else pytest.raises(TrainingOptionsError, match="num_mtp_steps: 4, now 2")
    with outcome:
        prepare(tmp_path, "--num-mtp-steps", steps, "--resume")


class Evaluations(TrainerCallback):
    """Steps and figures of the evaluations."""

    def __init__(self) -> None:
        self.done: list[tuple[int, dict[str, float]]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.done.append((state.global_step, metrics))


def test_a_training_that_is_resumed_at_its_end_trains_no_step(
    prepare: Callable[..., TrainingRun], rows: Path, tmp_path: Path
) -> None:
    # The second epoch ends after the fourth step.
    words = ("--max-steps", 3, "--logging-steps", 1, "--held-out", rows / "c", "--num-draft-levels", 3)
    run = prepare(tmp_path, *words)
    whole = {name: tensor.clone() for name, tensor in run.run().state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    again = prepare(tmp_path, *words, "--resume")
    evaluations = Evaluations()
    again.trainer.add_callback(evaluations)
    trained = again.run().state_dict()
    assert again.trainer.state.global_step == 3
    losses = [entry["step"] for entry in again.trainer.state.log_history if "loss" in entry]
    assert losses == [1, 2, 3]
    # The held-out rows may be others than before.
    assert [step for step, _ in evaluations.done] == [3]
    assert all(torch.equal(trained[name], tensor) for name, tensor in whole.items())
    saved = SparrowDraftModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in whole.items())
    assert not (tmp_path / "checkpoints" / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ((), [1, 2]),
        (("--eval-steps", 2), [2]),
        (("--eval-strategy", "no"), [2]),
        (("--save-strategy", "no"), [2]),
        (("--eval-delay", 5), [2]),
        # What is left is the best draft, which may be another than the last one.
        (("--load-best-model-at-end", "true"), [1, 2, 2]),
    ],
)
def test_a_finished_draft_is_evaluated_once(
    prepare: Callable[..., TrainingRun],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[Any, ...],
    steps: list[int],
) -> None:
    run = prepare(tmp_path, "--held-out", rows / "c", *words)
    evaluations, chosen_by = Evaluations(), []
    run.trainer.add_callback(evaluations)
    monkeypatch.setattr(runs, "write_depth", lambda draft, output, decoding, metrics: chosen_by.append(metrics) or "")
    run.run()
    assert [step for step, _ in evaluations.done] == steps
    (metrics,) = chosen_by
    assert metrics["eval_tau"] >= 1 and metrics["eval_accepted_1"] == evaluations.done[-1][1]["eval_accepted_1"]


def test_the_target_is_read_once_for_its_digest(
    prepare: Callable[..., TrainingRun], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    monkeypatch.setattr(
        targets, "tensor_digest", lambda tensors: digests.append(tensor_digest(tensors)) or digests[-1]
    )
    run = prepare(tmp_path, "--held-out", rows / "c")
    assert len(digests) == 1 and run.trainer.seal.settings["target_sha256"] == digests[0]
