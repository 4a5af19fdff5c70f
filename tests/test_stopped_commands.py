"""Every verb ends in one sentence, and where it can be continued, the command in that sentence goes on exactly."""

import errno
import json
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from stopping import Ended, in_child, lines_in, needs_fork, sparrow
from typer.testing import CliRunner
from untrained import save_models

from sparrow_hf import SparrowDraftModel, resources
from sparrow_hf.cli import app, common
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip

ROWS = 6
STOPS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
TRAINING = ("--use-cpu", "--report-to", "none", "--max-steps", 6, "--save-steps", 2, "--logging-steps", 1)
SMALL = ("--num-mtp-steps", 1, "--num-draft-levels", 2, "--num-glimpse-tokens", 2)
TIMES = {"sha256", "seconds", "tokens_per_second", "runs", "provenance", "visual_tokens"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, its draft, videos, prompts about them, and the answers of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("work")
    save_models(folder)
    rows = []
    for number in range(ROWS):
        clip = make_clip(folder / "videos" / f"{number}.mp4", EVALUATION_SEEDS[number], visual_tokens=24)
        rows.append(json.dumps({"messages": clip.messages}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(rows))
    ended = sparrow(*command("regenerate", folder, folder / "answers"))
    assert ended.code == 0, ended.output
    return folder


def command(verb: str, work: Path, output: Path) -> tuple[object, ...]:
    """A command whose output is `output`."""
    target, draft = ("--target", work / "target"), ("--draft", work / "draft")
    prompts, short = ("--prompts", work / "prompts.jsonl"), ("--max-new-tokens", 8)
    options: dict[str, tuple[object, ...]] = {
        "generate": (work / "videos", *draft, *short, "--output", output / "captions.jsonl"),
        "regenerate": (*prompts, *short, "--shard-size", 1, "--output", output),
        "record": ("--answers", work / "answers", "--output", output),
        "train": ("--train", work / "answers", "--output", output, *TRAINING, *SMALL),
        "bench": (
            *prompts, *draft, *short, "--arms", "none", "--runs", output / "runs", "--output", output / "results.json",
        ),
    }  # fmt: skip
    return (verb, *target, *options[verb])


#: Verb → what grows in its output folder while it works.
GROWING: dict[str, Callable[[Path], int]] = {
    "generate": lambda output: lines_in(output / "captions.jsonl"),
    "regenerate": lambda output: len(list(output.glob("answers-*.jsonl"))),
    "record": lambda output: len(list(output.glob("rows/row-*.safetensors"))),
    "train": lambda output: len(list(output.glob("checkpoints/*/trainer_state.json"))),
    "bench": lambda output: lines_in(output / "runs" / "bench.jsonl"),
}


def result_of(verb: str, output: Path) -> Any:
    """What a finished command leaves, without times."""
    if verb == "train":
        return {name: tensor.tolist() for name, tensor in load_file(output / "model.safetensors").items()}
    if verb == "record":
        files = sorted(output.glob("rows/*"))
        return {file.name: file.read_bytes() for file in files}
    files = {"generate": "captions.jsonl", "regenerate": "answers-*.jsonl", "bench": "runs/bench.jsonl"}
    lines = [json.loads(line) for file in sorted(output.glob(files[verb])) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def unstopped(work: Path) -> Callable[[str], Any]:
    """Verb → what it leaves if nothing stops it."""
    found: dict[str, Any] = {}

    def of(verb: str) -> Any:
        if verb not in found:
            output = work / "unstopped" / verb
            ended = sparrow(*command(verb, work, output))
            assert ended.code == 0, ended.output
            found[verb] = result_of(verb, output)
        return found[verb]

    return of


def assert_one_sentence(ended: Ended, begin: str) -> None:
    sentences = [line for line in ended.output.splitlines() if begin in line]
    assert len(sentences) == 1 and "Traceback" not in ended.output, ended.output


def stop_and_go_on(verb: str, work: Path, output: Path, stop: signal.Signals, after: int, delay: float) -> None:
    """Stops a command once so much is there, and lets the printed command (after a kill: the same) finish."""
    words = command(verb, work, output)
    clock = random.Random(delay)

    def reached() -> bool:
        # Not always right after a file has appeared.
        return GROWING[verb](output) >= after and clock.random() > delay

    ended = sparrow(*words, stop=stop, when=reached)
    if stop == signal.SIGKILL:
        assert ended.code == -stop
        words = (*words, "--resume") if verb == "train" and GROWING[verb](output) else words
    elif ended.code != 0:
        name = "Ctrl-C" if stop == signal.SIGINT else "SIGTERM"
        assert ended.code == 128 + stop, ended.output
        assert_one_sentence(ended, f"Stopped by {name}: ")
        words = tuple(ended.command)
    else:
        return
    finished = sparrow(*words)
    assert finished.code == 0, finished.output


@needs_fork
@pytest.mark.full
@pytest.mark.parametrize("verb", GROWING)
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("after", [1, 2])
def test_nothing_is_lost_or_doubled(
    verb: str, stop: signal.Signals, after: int, work: Path, unstopped: Callable[[str], Any], tmp_path: Path
) -> None:
    stop_and_go_on(verb, work, tmp_path, stop, after, 0.9)
    assert result_of(verb, tmp_path) == unstopped(verb)


@needs_fork
@pytest.mark.full
@pytest.mark.parametrize("verb", GROWING)
def test_a_full_disk_is_told(verb: str, work: Path, unstopped: Callable[[str], Any], tmp_path: Path) -> None:
    expected = unstopped(verb)
    files = [path for path in (work / "unstopped" / verb).rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    # Files of lines grow until they reach the limit; the others are written at once.
    ended = sparrow(
        *command(verb, work, tmp_path),
        largest_file=largest // 2 if verb in ("generate", "bench") else largest - 1,
    )
    assert ended.code == 4, ended.output
    assert_one_sentence(ended, "The disk is full")
    finished = sparrow(*ended.command)
    assert finished.code == 0, finished.output
    assert result_of(verb, tmp_path) == expected


def test_a_training_goes_on_with_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        trainer = SimpleNamespace(draft=torch.nn.Linear(1, 1))
        output = tmp_path

        def run(self) -> None:
            raise KeyboardInterrupt

    def last_checkpoint(folder: Path) -> str | None:
        assert folder == tmp_path / "checkpoints"
        return checkpoint

    monkeypatch.setattr("sparrow_hf.loading.load_target", lambda *_, **__: (None, None))
    monkeypatch.setattr("sparrow_hf.training.run.prepare_training", lambda *_: Stopped())
    monkeypatch.setattr("sparrow_hf.training.checkpoints.last_checkpoint", last_checkpoint)
    words = ["train", "--target", "t", "--train", "a", "--output", str(tmp_path), "--use-cpu"]
    go_on = f"go on with: sparrow {' '.join(words)}"
    checkpoint, told = None, f"Stopped by Ctrl-C: no checkpoint was saved yet; {go_on}"
    assert_ends(words, told)
    checkpoint, told = "checkpoint-2", f"Stopped by Ctrl-C: the training is kept up to checkpoint-2; {go_on} --resume"
    assert_ends(words, told)
    assert_ends([*words, "--resume"], told)


def assert_ends(words: list[str], told: str) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == told, result.output


@needs_fork
@pytest.mark.full
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.9, 0.97, 0.99])
def test_a_stopped_save_leaves_a_whole_draft(stop: signal.Signals, delay: float, work: Path, tmp_path: Path) -> None:
    draft = SparrowDraftModel.from_pretrained(work / "draft")
    weights = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    draft.save_pretrained(tmp_path)
    clock = random.Random(delay)

    def save_for_ever() -> None:
        with torch.no_grad():
            while True:
                for parameter in draft.parameters():
                    parameter.neg_()
                draft.save_pretrained(tmp_path)

    assert in_child(save_for_ever, stop=stop, when=lambda: clock.random() > delay).code != 0
    found = SparrowDraftModel.from_pretrained(tmp_path).state_dict()
    signs = {
        torch.equal(found[name], sign * weights[name]) and sign
        for name in weights
        for sign in (1, -1)
        if weights[name].abs().sum() > 0
    }
    assert signs - {False} in ({1}, {-1})


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C: nothing new is kept; start again with: sparrow vocab"),
        (common.Terminated(), 143, "Stopped by SIGTERM: nothing new is kept; start again with: sparrow vocab"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "The disk is full"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 4, "disk"),
        (
            RuntimeError("[enforce fail at x.cc:664] . PytorchStreamWriter failed writing file"),
            4,
            "disk",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), 4, "disk"),
        (MemoryError(), 4, "Memory ran out (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 4, "Memory ran out (OutOfMemoryError"),
        (
            RuntimeError("[enforce fail at x.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
            4,
            "Memory",
        ),
        (KeyError("vision_config"), 2, "Error: KeyError: 'vision_config'"),
        (RuntimeError("one\n  two\n" + "x" * 9000), 2, "Error: RuntimeError: one two x"),
        (TrainingDataError("row 1: no answer"), 2, "Error: row 1: no answer"),
    ],
)
def test_any_error_is_one_sentence(
    error: BaseException, code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("sparrow_hf.cli.vocab.quiet_transformers", fail)
    words = ["vocab", "--target", "a b", "--answers", str(tmp_path), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code and sentence in result.stderr, result.output
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    for debugged in (["--debug", *words], [*words, "--debug"]):
        result = CliRunner().invoke(app, debugged)
        assert result.exit_code == code and "Traceback (most recent call last)" in result.stderr
        assert "--debug" not in result.stderr.splitlines()[-1]


def test_an_error_that_was_told_otherwise_is_still_one_of_memory() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise TrainingDataError("row 1: MemoryError: ") from error
    except TrainingDataError as error:
        assert resources.ran_out(error) == "memory"
    assert resources.ran_out(ValueError("a memory of the past")) is None
    assert resources.ran_out(FileNotFoundError(errno.ENOENT, "No such file")) is None


def test_a_verb_hands_on_what_is_not_its_own_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def parse(words: list[str]) -> Any:
        seen.append(words)
        raise TrainingDataError("enough")

    monkeypatch.setattr("sparrow_hf.training.options.parse_options", parse)
    for words in (["--debug", "underflow_overflow", "--seed", "1"], ["--seed", "1", "--debug"]):
        assert CliRunner().invoke(app, ["train", *words]).exit_code == 2
    assert seen == [["--debug", "underflow_overflow", "--seed", "1"], ["--seed", "1"]]


def test_the_command_is_named_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sparrow"])
    assert common.program() == ["sparrow"]
    monkeypatch.setattr(sys, "argv", [str(Path(common.__file__).with_name("__main__.py"))])
    assert common.program() == [sys.executable, "-m", "sparrow_hf.cli"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.program() == ["accelerate", "launch", "--num_processes", "2", "-m", "sparrow_hf.cli"]


def test_exit_codes_are_documented_where_they_are_looked_for() -> None:
    page = (Path(__file__).parents[1] / "docs" / "generate.md").read_text()
    for words in (["--help"], ["generate", "--help"], ["train", "--help"]):
        told = " ".join(CliRunner().invoke(app, words, env={"COLUMNS": "200"}).output.split())
        assert "Exit codes: 0 done, 1 a text differs" in told
    codes = (0, common.NOT_IDENTICAL, common.BAD_INPUT, common.BAD_ROWS, common.RAN_OUT, common.INTERRUPTED)
    for code in (*codes, common.TERMINATED):
        assert f"| {code} |" in page
