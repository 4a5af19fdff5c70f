"""All steps of a user on the command line: prompts about videos → answers → recording → draft → generate."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback
from typer.testing import CliRunner, Result
from untrained import save_target

from sparrow_hf import SparrowDraftModel
from sparrow_hf.cli import app
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip
from sparrow_hf.testbed.nano import build_processor, load_target
from sparrow_hf.training import DecodingCallback, SparrowTrainer
from sparrow_hf.video import prepare_inputs

TRAINING = (
    "--use-cpu",
    "--report-to",
    "none",
    "--disable-tqdm",
    "true",
    "--max-steps",
    4,
    "--learning-rate",
    1e-2,
    "--logging-steps",
    1,
)
SMALL = ("--num-mtp-steps", 2, "--num-draft-levels", 3, "--num-glimpse-tokens", 4)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, videos, prompts, and what `regenerate`, `vocab` and `record` made of them."""
    folder = tmp_path_factory.mktemp("work")
    save_target(folder / "target")
    for split, numbers in (("prompts", range(4)), ("held_out", range(4, 6))):
        rows = []
        for number in numbers:
            path = folder / "my_videos" / f"{number}.mp4"
            clip = make_clip(path, EVALUATION_SEEDS[number], visual_tokens=24)
            messages = clip.messages
            messages[0]["content"][0]["video"] = f"my_videos/{number}.mp4"
            rows.append({"messages": messages})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ("--prompts", folder / f"{split}.jsonl", "--output", folder / f"{split}_answers")
        succeed("regenerate", "--target", folder / "target", *options, "--max-new-tokens", 12)
    answers = folder / "prompts_answers"
    succeed("vocab", "--target", folder / "target", "--answers", answers, "--output", folder, "--size", 40)
    succeed("record", "--target", folder / "target", "--answers", answers, "--output", folder / "recording")
    return folder


@pytest.fixture(autouse=True)
def short_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out prompts are decoded for 12 tokens: the untrained target would go on for all 256."""
    monkeypatch.setattr("sparrow_hf.training.run.DecodingCallback", partial(DecodingCallback, max_new_tokens=12))


def train(work: Path, output: Path, *options: object, rows: str = "prompts_answers") -> Result:
    return run("train", "--target", work / "target", "--train", work / rows, "--output", output, *TRAINING, *options)


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_from_videos_to_generate(work: Path, tmp_path: Path) -> None:
    held_out = ("--held-out", work / "held_out_answers", "--vocabulary", work / "vocabulary.safetensors")
    result = train(work, tmp_path / "draft", *SMALL, *held_out, "--save-steps", 2)
    assert result.exit_code == 0, result.output
    state = json.loads((tmp_path / "draft" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = {name for entry in state["log_history"] for name in entry}
    assert {"loss", "eval_tau", "eval_decoded_tau", "eval_identical"} <= logged
    assert all(entry.get("eval_identical", 1.0) == 1.0 for entry in state["log_history"])

    target, processor = load_target(work / "target")
    draft = AutoModel.from_pretrained(tmp_path / "draft")
    assert draft.config.draft_vocab_size == 40 and draft.config.num_mtp_steps == 2
    clip = make_clip(tmp_path / "new.mp4", EVALUATION_SEEDS[9], visual_tokens=24)
    inputs = prepare_inputs(processor, clip.messages)
    plain = target.generate(**inputs, max_new_tokens=12)
    assert torch.equal(target.generate(**inputs, max_new_tokens=12, assistant_model=draft), plain)
    assert draft.last_generation.rounds > 0


#: What every verb that writes answers is told beside its models.
WRITES_ANSWERS = {
    "generate": ("{work}/my_videos/0.mp4", "--compare"),
    "regenerate": ("--prompts", "{work}/prompts.jsonl", "--output", "{out}", "--batch-size", 2),
    "demo": ("--video", "{work}/my_videos/0.mp4", "--question", "What moves?"),
    "bench": ("--prompts", "{work}/prompts.jsonl", "--limit", 1, "--output", "{out}/b.json", "--runs", "{out}"),
    "tune": ("--prompts", "{work}/prompts.jsonl", "--limit", 1, "--verify", 1, "--dry-run"),
    "analyze": ("--prompts", "{work}/prompts.jsonl", "--output", "{out}"),
    "train": ("--train", "{work}/prompts_answers", "--held-out", "{work}/held_out_answers", "--output", "{out}"),
}


@pytest.mark.parametrize("verb", WRITES_ANSWERS)
def test_targets_with_stop_strings(work: Path, tmp_path: Path, verb: str) -> None:
    target = save_target(tmp_path / "target")
    target.generation_config.stop_strings = ["nowhere to be found"]
    target.save_pretrained(tmp_path / "target")
    SparrowDraftModel.from_target(target, num_glimpse_tokens=4).save_pretrained(tmp_path / "draft")
    folders = {"work": work, "out": tmp_path / "out"}
    options = [each.format(**folders) if isinstance(each, str) else each for each in WRITES_ANSWERS[verb]]
    options += [] if verb in ("train", "regenerate") else ["--draft", tmp_path / "draft"]
    options += [*TRAINING, *SMALL] if verb == "train" else ["--max-new-tokens", 8]
    succeed(verb, *options, "--target", tmp_path / "target")


def test_a_recording_trains_the_same_draft(work: Path, tmp_path: Path) -> None:
    online = train(work, tmp_path / "online", *SMALL)
    recorded = train(work, tmp_path / "recorded", *SMALL, rows="recording")
    assert online.exit_code == recorded.exit_code == 0, online.output + recorded.output
    assert_same(weights(tmp_path / "online"), weights(tmp_path / "recorded"))


def test_held_out_rows_are_decoded_as_training_reads_them(work: Path, tmp_path: Path) -> None:
    """By paths that start at their file's folder, at their own `fps`, without any of the answers they end with."""
    part = {"type": "video", "video": "my_videos/5.mp4"}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "describe this video ."}]}
    said = [{"role": "assistant", "content": text} for text in ("a dot", "a ring")]
    held_out = work / "own_frames.jsonl"
    held_out.write_text(json.dumps({"messages": [asked, *said], "fps": 2}) + "\n")
    seen = []

    class Watched(DecodingCallback):
        def _prompts(self, rows: Any) -> Any:
            for prompt in super()._prompts(rows):
                seen.append(prompt)
                yield prompt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparrow_hf.training.run.DecodingCallback", partial(Watched, max_new_tokens=12))
        result = train(work, tmp_path / "draft", *SMALL, "--held-out", held_out)
    assert result.exit_code == 0, result.output
    part["video"] = str(work / part["video"])
    expected = prepare_inputs(build_processor(), [asked], fps=2)
    assert seen and all(torch.equal(prompt[name], value) for prompt in seen for name, value in expected.items())


class _PowerCut(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_resume_overwrites_nothing_and_ends_the_same(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*SMALL, "--save-steps", 2)
    assert train(work, tmp_path / "whole", *options).exit_code == 0
    make = SparrowTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(SparrowTrainer, "__init__", lambda self, *args, **kwargs: (
            make(self, *args, **kwargs), self.add_callback(_PowerCut()))[0])  # fmt: skip
        stopped = train(work, tmp_path / "cut", *options)
    assert stopped.exit_code == 130 and "Stopped by Ctrl-C" in stopped.output
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    refused = train(work, tmp_path / "cut", *options)
    assert refused.exit_code == 2 and "--resume" in refused.output
    resumed = train(work, tmp_path / "cut", *options, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    finished = train(work, tmp_path / "whole", *options)
    assert finished.exit_code == 2
    nothing = train(work, tmp_path / "none", *options, "--resume")
    assert nothing.exit_code == 2 and "no checkpoint" in nothing.output


def test_warm_start_and_lora(work: Path, tmp_path: Path) -> None:
    assert train(work, tmp_path / "first", *SMALL).exit_code == 0
    warm = train(work, tmp_path / "warm", "--warm-start", tmp_path / "first", "--learning-rate", 0.0)
    assert warm.exit_code == 0, warm.output
    assert_same(weights(tmp_path / "warm"), weights(tmp_path / "first"))
    lora = train(work, tmp_path / "lora", "--warm-start", tmp_path / "first", "--lora", 4)
    assert lora.exit_code == 0, lora.output
    first, adapted = weights(tmp_path / "first"), weights(tmp_path / "lora")
    assert first.keys() == adapted.keys()
    changed = {name for name in first if not torch.equal(first[name], adapted[name])}
    assert "fc.weight" in changed and not any("norm" in name for name in changed)


def test_a_finished_training_is_inspected_by_its_own_command(work: Path, tmp_path: Path) -> None:
    command = (work, tmp_path / "draft", *SMALL, "--save-steps", 2)
    assert train(*command).exit_code == 0

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    for option, shown in (("--inspect=0", "visual runs: 24 from token"), ("--dry-run", "one checkpoint")):
        told = train(*command, option)
        assert told.exit_code == 0 and shown in told.output, told.output
    assert files() == before
    assert train(*command).exit_code == 2


def test_a_processor_that_lies_elsewhere(work: Path, tmp_path: Path) -> None:
    for name in ("alone", "processor"):
        shutil.copytree(work / "target", tmp_path / name)
    for path in (tmp_path / "alone").iterdir():
        if not path.name.startswith(("config", "generation_config", "model")):
            path.unlink()
    alone = train(work, tmp_path / "draft", "--target", tmp_path / "alone", "--inspect", 0)
    assert alone.exit_code == 2 and "processor" in alone.output and "cannot be loaded" in alone.output
    options = ("--target", tmp_path / "alone", "--processor", tmp_path / "processor", "--dtype", "float32")
    told = train(work, tmp_path / "draft", *options, *SMALL, "--inspect", 0)
    assert told.exit_code == 0, told.output
    assert told.output == train(work, tmp_path / "draft", *SMALL, "--inspect", 0).output


def test_inspect_and_dry_run(work: Path, tmp_path: Path) -> None:
    shown = train(work, tmp_path / "draft", *SMALL, "--inspect", 1)
    assert shown.exit_code == 0, shown.output
    assert "visual runs: 24 from token" in shown.output and "11 with a loss in pass 0" in shown.output
    cost = train(work, tmp_path / "draft", *SMALL, "--dry-run")
    assert cost.exit_code == 0, cost.output
    assert "Time was measured on the forward and backward of 4 training rows in batches of " in cost.output
    assert not (tmp_path / "draft" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--held-out", "prompts.jsonl"), "held-out"),
        (("--inspect", 99), "no such row; give a number from 0 to 3"),
        (("--inspect", 0, "--streaming", "--max-steps", 1), "leave out --streaming"),
        (("--vocabulary", "prompts.jsonl"), "sparrow vocab"),
        (("--draft-dtype", "int8"), "draft-dtype"),
        (("--target-dtype", "float8"), "target-dtype"),
        (("--output-dir", "elsewhere"), "leave this option out"),
        (("--remove-unused-columns", "true"), "must stay False"),
    ],
)
def test_what_cannot_work_is_one_sentence(work: Path, tmp_path: Path, options: Any, sentence: str) -> None:
    words = [work / word if str(word).endswith("jsonl") else word for word in options]
    result = train(work, tmp_path / "draft", *words)
    assert result.exit_code == 2, result.output
    assert sentence in result.output and "Traceback" not in result.output


def test_streamed_rows_train_the_same_draft_as_rows_in_order(work: Path, tmp_path: Path) -> None:
    in_order = train(work, tmp_path / "loaded", *SMALL, "--train-sampling-strategy", "sequential")
    streamed = train(work, tmp_path / "streamed", *SMALL, "--streaming", "true")
    assert in_order.exit_code == streamed.exit_code == 0, in_order.output + streamed.output
    assert_same(weights(tmp_path / "loaded"), weights(tmp_path / "streamed"))


def test_help_names_every_option_and_starts_nothing(tmp_path: Path) -> None:
    text = succeed("train", "--help")
    assert all(f"--{name}" in text for name in ("num-mtp-steps", "num-visual-rows-max", "on-bad-row", "lora"))
    assert "required" in text and "--learning-rate" in text
    assert " ".join(text.split()).endswith(
        "except --output-dir, --resume-from-checkpoint, --remove-unused-columns, --label-smoothing-factor, "
        "--neftune-noise-alpha, --batch-eval-metrics, --eval-do-concat-batches and --include-num-input-tokens-seen."
    )
