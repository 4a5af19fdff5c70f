"""The command line, run in this process on an untrained target of two layers, and once on what ships."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from typer.testing import CliRunner, Result
from untrained import save_models

import sparrow_hf
from sparrow_hf import _transformers, extras, testbed
from sparrow_hf.cli import app
from sparrow_hf.evaluation import demo
from sparrow_hf.generation.emission import TokenEmitter
from sparrow_hf.loading import load_target
from sparrow_hf.metrics import Run
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip
from sparrow_hf.tree_shapes import chain

VERDICT_KEYS = {"identical", "clips", "visual_tokens", "tau", "k", "per_position", "dsr", "esr"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options that name an untrained target and its draft."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "mine.mp4"
    make_clip(path, EVALUATION_SEEDS[7], visual_tokens=32)
    return path


def test_version_and_help():
    assert run("--version").output.split() == ["sparrow-hf", sparrow_hf.__version__]
    listing = run("demo", "--help")
    assert listing.exit_code == 0
    assert "--visual-tokens" in listing.output
    assert run().exit_code == 2


def test_the_doctor_says_what_is_installed(monkeypatch: pytest.MonkeyPatch):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    told = {words[0]: " ".join(words[1:]) for words in map(str.split, result.output.splitlines())}
    assert told["sparrow-hf"] == sparrow_hf.__version__
    assert told["torch"] == torch.__version__
    assert told["transformers"].startswith(transformers.__version__)
    assert all(version in told["transformers"] for version in _transformers.TESTED_VERSIONS)
    assert told["contract"].startswith("kept")
    assert {told[f"[{extra}]"] for extra in extras.EXTRAS} == {"installed"}
    assert "cpu" in told["devices"]

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "av" else find_spec(name))
    monkeypatch.setattr(_transformers, "contract_breaches", lambda: ("GenerationMixin._prefill is missing",))
    result = run("doctor")
    assert result.exit_code == 2
    assert "GenerationMixin._prefill is missing" in result.output
    assert "without av" in result.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--fps", 2, "--num-frames", 3), "Error: fps (2.0) and num_frames (3) exclude each other: give one."),
        (("--start", 5, "--end", 2), "Error: end must be behind start (5.0 s), got 2.0 s."),
    ],
)
def test_the_doctor_refuses_senseless_sampling_in_one_sentence(clip: Path, options: Any, told: str):
    result = run("doctor", "--video", clip, *options)
    assert result.exit_code == 2 and result.stderr.strip() == told, result.output


@pytest.mark.parametrize(
    "verb",
    [
        command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        # `doctor` looks at the machine, not at a target.
        if command.callback and command.callback.__name__ != "doctor"
    ],
)
def test_every_verb_has_help(verb: str):
    listing = run(verb, "--help")
    assert listing.exit_code == 0, listing.output
    assert "--target" in listing.output


def test_help_shows_the_names_of_arms_in_full():
    # Square brackets are markup to rich unless they are escaped.
    listing = " ".join(run("bench", "--help").output.replace("│", " ").split())
    assert "draft[:ID][@TREE][/glimpse=M]" in listing


def test_demo_writes_its_verdict(models: tuple[object, ...], tmp_path: Path):
    file = tmp_path / "results" / "verdict.json"
    result = run(
        "demo", *models, "--visual-tokens", 24, "--max-new-tokens", 12, "--tree", "10-2-4", "--json", file,
        "--output", tmp_path / "clips",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "IDENTICAL in 1 clip · τ" in result.output
    assert [path.name for path in (tmp_path / "clips").iterdir()] == [f"clip-{EVALUATION_SEEDS[0]}.mp4"]

    verdict = json.loads(file.read_text())
    assert verdict.keys() > VERDICT_KEYS
    assert verdict["identical"] is True
    assert (verdict["clips"], verdict["visual_tokens"]) == (1, 24)
    assert len(verdict["per_position"]) == 2
    assert verdict["k"] == pytest.approx(sum(verdict["per_position"]))
    assert verdict["dsr"] > 0 and verdict["esr"] > 0 and verdict["same_engine_dsr"] > 0
    assert (verdict["provenance"]["tree"], verdict["provenance"]["seed"]) == ("10-2-4", 0)
    assert verdict["provenance"]["dtype"] == "float32"


SHORT, LONG = Run(1, 0, 0, [], 3, 0.1, 0.0), Run(5, 4, 2, [1, 1], 3, 0.1, 0.2)


def verdict_of(*runs: Run) -> demo.Verdict:
    return demo.Verdict(len(runs), 24, {name: list(runs) for name in ("plain", "draft", "none")}, {"dtype": "float32"})


def test_demo_leaves_single_tokens_out_of_the_speed():
    verdict = verdict_of(SHORT, LONG)
    assert verdict.speed is not None and verdict.speed.dsr_per_prompt == [1.0]
    assert verdict.to_dict()["dsr"] == verdict.to_dict()["same_engine_dsr"] == 1.0


def test_demo_of_single_tokens_tells_no_speed():
    console, verdict = Console(width=200), verdict_of(SHORT)
    with console.capture() as captured:
        demo.print_verdict(verdict, console)
    assert "IDENTICAL in 1 clip" in captured.get() and "DSR" not in captured.get()
    assert "no speed, every answer is a single token" in captured.get()
    assert "dsr" not in verdict.to_dict() and verdict.to_dict()["same_engine_dsr"] is None


def test_demo_over_several_clips(models: tuple[object, ...], tmp_path: Path):
    file = tmp_path / "verdict.json"
    result = run(
        "demo", *models, "--clips", 3, "--visual-tokens", 24, "--max-new-tokens", 6, "--seed", 5, "--json", file,
        "--output", tmp_path / "clips",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "IDENTICAL in 3 clips · τ" in result.output
    assert json.loads(file.read_text())["clips"] == 3
    names = {f"clip-{seed}.mp4" for seed in EVALUATION_SEEDS[5:8]}
    assert {path.name for path in (tmp_path / "clips").iterdir()} == names


def test_demo_on_a_video_of_ones_own(models: tuple[object, ...], clip: Path):
    question = "What moves here?"
    result = run("demo", *models, "--video", clip, "--max-new-tokens", 6, "--max-frames", 8, "--question", question)
    assert result.exit_code == 0, result.output
    assert f"mine.mp4 · 16 visual tokens · “{question}”" in result.output
    assert "IDENTICAL" in result.output


def test_a_single_wrong_token_is_an_error(
    models: tuple[object, ...], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = TokenEmitter.choose
    monkeypatch.setattr(TokenEmitter, "choose", lambda self, *args: (right(self, *args) + 1) % 300)
    result = run("demo", *models, "--video", clip, "--max-new-tokens", 4)
    assert result.exit_code == 1
    assert "NOT IDENTICAL" in result.output

    # Elsewhere two nearly equal tokens may swap.
    target, processor = load_target(str(models[1]))
    for part in (target.to(torch.bfloat16), processor):
        part.save_pretrained(tmp_path)
    result = run("demo", "--target", tmp_path, *models[2:], "--video", clip, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert "NOT IDENTICAL" in result.output and "in bfloat16 two nearly equal tokens may swap" in result.output


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--video", "missing.mp4"], "missing.mp4"),
        (["--video", "notes.mp4"], "cannot be read as a video"),
        (["--video", "empty.mp4"], "empty file"),
        (["--video", "notes.mp4", "--clips", "3"], "--video captions one file and generates no clips: leave out"),
        (["--video", "notes.mp4", "--seed", "0"], "--video captions one file and generates no clips: leave out"),
        (
            ["--video", "notes.mp4", "--visual-tokens", "400"],
            "leave out --clips, --visual-tokens, --seed and --output",
        ),
        (["--video", "notes.mp4", "--output", "clips"], "--video captions one file and generates no clips: leave out"),
        (["--question", "What?"], "leave out --question, --fps and --max-frames"),
        (["--fps", "8"], "leave out --question, --fps and --max-frames"),
        (["--max-frames", "768"], "leave out --question, --fps and --max-frames"),
        (["--tree", "oak"], "unknown tree 'oak'"),
        (["--tree", "1-5-10"], "one node means no draft level"),
        (["--target", "nowhere"], "target 'nowhere' cannot be loaded"),
        (["--draft", "nowhere"], "draft 'nowhere' cannot be loaded"),
        (["--device", "cuda:99"], "cannot be loaded"),
        (["--family", "qwen2.5-vl"], "leave it out beside --target"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    wrong: list[str], sentence: str, models: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("notes.mp4").write_text("not a video")
    Path("empty.mp4").touch()
    result = run("demo", *models, *wrong)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Error: " in result.output
    assert "Traceback" not in result.output


def test_a_target_without_its_draft(models: tuple[object, ...]):
    result = run("demo", *models[:2])
    assert result.exit_code == 2
    assert "name one with --draft" in result.output


def test_ctrl_c_ends_quietly(models: tuple[object, ...], clip: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(self: TokenEmitter, *args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenEmitter, "choose", interrupt)
    result = run("demo", *models, "--video", clip, "--max-new-tokens", 4)
    assert result.exit_code == 130
    assert "Stopped by Ctrl-C: nothing new is kept; start again with: sparrow demo --target" in result.output
    assert "Traceback" not in result.output


def test_demo_of_the_testbed_that_ships(tmp_path: Path):
    threads = torch.get_num_threads()
    file = tmp_path / "verdict.json"
    result = run("demo", "--visual-tokens", 64, "--max-new-tokens", 48, "--json", file)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    verdict = json.loads(file.read_text())
    assert verdict["identical"] is True
    assert verdict["tau"] > 3


def test_a_temperature_alone_samples(models: tuple[object, ...], tmp_path: Path):
    """In `regenerate` as in `generate`."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "describe this video ."}]}) + "\n")
    for number, (options, expected) in enumerate(
        (
            ([], {"do_sample": False}),
            (["--do-sample"], {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}),
            (["--temperature", 0.8], {"do_sample": True, "temperature": 0.8, "top_p": 1.0, "top_k": 0}),
            (["--top-p", 0.9], {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}),
            (["--top-k", 5], {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 5}),
        )
    ):
        output, length = tmp_path / str(number), ("--max-new-tokens", 4)
        told = run("regenerate", *models[:2], "--prompts", prompts, "--output", output, *length, *options)
        assert told.exit_code == 0, told.output
        settings = json.loads((output / "provenance.json").read_text())["settings"]
        answered = run("generate", prompts, *models, "--json", *length, *options)
        assert answered.exit_code == 0, answered.output
        assert settings == json.loads(answered.stdout)["provenance"]["settings"] == expected | {"max_new_tokens": 4}


def test_answers_and_recording_from_a_list_of_prompts(models: tuple[object, ...], clip: Path, tmp_path: Path):
    def ask(*parts: dict[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "describe this video ."}]}]}

    prompts, answers, recording = tmp_path / "prompts.jsonl", tmp_path / "answers", tmp_path / "recording"
    rows = [ask({"type": "video", "video": str(clip)}), ask({"type": "video", "video": "nowhere.mp4"}), ask()]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target, draft = models[1], models[3]

    refused = run("regenerate", "--target", target, "--prompts", prompts, "--output", answers)
    assert refused.exit_code == 2 and "row 1: There is no video file" in refused.output
    shutil.rmtree(answers)
    options = ("--max-new-tokens", 8, "--on-bad-row", "skip", "--draft", draft)
    written = run("regenerate", "--target", target, "--prompts", prompts, "--output", answers, *options)
    assert written.exit_code == 0, written.output
    assert "3 prompts; answers of up to 8 tokens take at most about" in written.output
    assert "left out row 1: " in written.output and "1 of 3 rows left out." in written.output

    too_large = run("record", "--target", target, "--answers", answers, "--output", recording, "--max-disk-gb", 1e-6)
    assert too_large.exit_code == 2 and "--max-disk-gb" in too_large.output
    assert not recording.exists()
    recorded = run(
        "record",
        "--target",
        target,
        "--answers",
        answers,
        "--output",
        recording,
        "--feature-layers",
        1,
        "--feature-layers",
        -1,
    )
    assert recorded.exit_code == 0, recorded.output
    assert "2 rows; the recording takes about" in recorded.output
    assert len(list((recording / "rows").glob("*.safetensors"))) == 2
    assert json.loads((recording / "recording.json").read_text())["text_layers"] == [1, 2]
    missing = run("record", "--target", "nowhere", "--answers", answers, "--output", recording)
    assert missing.exit_code == 2 and "target 'nowhere'" in missing.output


def test_the_demo_decodes_with_a_draft_of_the_targets_dtype(clip: Path) -> None:
    target, processor, draft = testbed.load("qwen2.5-vl")
    models = demo.Models(target.to(torch.bfloat16), processor, draft)
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "describe this video ."}]
    question = demo.VideoQuestion("clip.mp4", [{"role": "user", "content": content}])
    options: dict[str, Any] = {"tree": chain(3), "max_new_tokens": 2, "console": Console(quiet=True)}
    demo.run_demo(models, iter([question]), 1, **options)
    assert draft.dtype == torch.bfloat16
