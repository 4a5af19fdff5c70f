"""Every verb ends in one sentence, and where it can be continued, the command in that sentence goes on exactly."""

import errno
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from stopping import Ended, in_process, needs_posix, sparrow
from typer.testing import CliRunner
from untrained import save_models

from sparrow_hf import SparrowDraftModel, resources, signals
from sparrow_hf.cli import app, common
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip

ROWS = 6
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
    finish(*command("regenerate", folder, folder / "answers"))
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


VERBS = ("generate", "regenerate", "record", "train", "bench")


def finish(*words: object) -> None:
    """Runs a command to its end, in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


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


class Unstopped(NamedTuple):
    """What a run leaves that nothing stops, how often it changes files, and its largest file."""

    result: Any
    changes: int
    largest_file: int


@pytest.fixture(scope="module")
def unstopped(work: Path) -> Callable[[str], Unstopped]:
    found: dict[str, Unstopped] = {}

    def of(verb: str) -> Unstopped:
        if verb not in found:
            output = work / f"unstopped-{verb}"
            ended = sparrow(*command(verb, work, output), watched=output)
            assert ended.code == 0, ended.output
            largest = max(path.stat().st_size for path in output.rglob("*") if path.is_file())
            found[verb] = Unstopped(result_of(verb, output), ended.changes, largest)
        return found[verb]

    return of


def assert_one_sentence(ended: Ended, begin: str) -> None:
    sentences = [line for line in ended.output.splitlines() if begin in line]
    assert len(sentences) == 1 and "Traceback" not in ended.output, ended.output


def go_on(verb: str, work: Path, output: Path, ended: Ended) -> None:
    """Finishes a run that was stopped, with the command that it has printed, or with its own if it was killed."""
    words: Sequence[object] = command(verb, work, output)
    if ended.code >= 0:
        words = ended.command
    elif list(output.glob("checkpoints/*/trainer_state.json")):
        words = [*words, "--resume"]
    finish(*words)


@needs_posix
@pytest.mark.full
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_lost_or_doubled(
    verb: str, stop: signal.Signals, number: int, work: Path, unstopped: Callable[[str], Unstopped], tmp_path: Path
) -> None:
    expected, output = unstopped(verb), tmp_path / "output"
    at = random.Random(f"{verb} {stop} {number}").randrange(expected.changes)
    ended = sparrow(*command(verb, work, output), watched=output, stop=stop, at=at)
    if stop == signal.SIGKILL:
        assert ended.code == -stop, ended.output
    else:
        assert ended.code == 128 + stop, ended.output
        assert_one_sentence(ended, "Stopped by Ctrl-C: " if stop == signal.SIGINT else "Stopped by SIGTERM: ")
    go_on(verb, work, output, ended)
    assert result_of(verb, output) == expected.result


@needs_posix
@pytest.mark.full
@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_told(
    verb: str, dies: bool, work: Path, unstopped: Callable[[str], Unstopped], tmp_path: Path
) -> None:
    """The disk is full in the middle of a write, or the process is killed in it."""
    expected, output = unstopped(verb), tmp_path / "output"
    # Files of lines grow until they reach the limit; the others are written at once.
    room = expected.largest_file // 2 if verb in ("generate", "bench") else expected.largest_file - 1
    ended = sparrow(*command(verb, work, output), largest_file=room, dies=dies)
    if dies:
        assert ended.code == -signal.SIGXFSZ, ended.output
    else:
        assert ended.code == 4, ended.output
        assert_one_sentence(ended, "The disk is full")
    go_on(verb, work, output, ended)
    assert result_of(verb, output) == expected.result


def test_a_training_goes_on_with_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        trainer = SimpleNamespace(draft=torch.nn.Linear(1, 1))
        output = tmp_path
        choices = ()

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


def save_negated() -> None:
    """Saves a draft over itself, all its weights negated."""
    draft = SparrowDraftModel.from_pretrained(sys.argv[1])
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.neg_()
    draft.save_pretrained(sys.argv[1])


@needs_posix
@pytest.mark.full
def test_a_killed_save_leaves_the_old_draft_or_the_new_one(work: Path, tmp_path: Path) -> None:
    old = SparrowDraftModel.from_pretrained(work / "draft").state_dict()

    def save(name: str, **stop: Any) -> tuple[Ended, str]:
        """How a save ends, and which draft is there then."""
        folder = shutil.copytree(work / "draft", tmp_path / name)
        ended = in_process("test_stopped_commands:save_negated", folder, watched=folder, **stop)
        found = SparrowDraftModel.from_pretrained(folder).state_dict()
        return ended, "old" if is_same(found, old) else "new" if is_negated(found, old) else "mixed"

    ended, found = save("whole")
    assert (ended.code, found) == (0, "new"), ended.output
    seen = []
    for at in range(ended.changes):
        killed, found = save(str(at), stop=signal.SIGKILL, at=at)
        assert killed.code == -signal.SIGKILL, killed.output
        seen.append(found)
    order = ["old", "new"]
    assert seen == sorted(seen, key=order.index) and seen[0] == "old"
    for dies, code in ((False, 1), (True, -signal.SIGXFSZ)):
        largest = max(path.stat().st_size for path in (work / "draft").iterdir())
        full, found = save(f"full-{dies}", largest_file=largest - 1, dies=dies)
        assert (full.code, found) == (code, "old"), full.output


def is_negated(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return is_same(left, {name: -tensor for name, tensor in right.items()})


def is_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C: nothing new is kept; start again with: sparrow vocab"),
        (signals.Terminated(), 143, "Stopped by SIGTERM: nothing new is kept; start again with: sparrow vocab"),
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


def test_what_cannot_be_counted_is_said() -> None:
    def kept() -> str:
        raise TrainingDataError("answers-00005.jsonl is not in digests.sha256")

    ending = common.Ending(["regenerate", "--target", "t"])
    ending.keeps(kept)
    assert str(ending) == (
        "what is kept cannot be counted (answers-00005.jsonl is not in digests.sha256); go on with: "
        "sparrow regenerate --target t"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((1, "answer", 40), "1 of 40 answers is kept in here"),
        ((3, "row", 40), "3 of 40 rows are kept in here"),
        ((1, "row", 1), "1 of 1 row is kept in here"),
        ((1, "measured prompt"), "1 measured prompt is kept in here"),
        ((0, "measured prompt"), "0 measured prompts are kept in here"),
    ],
)
def test_what_is_kept_is_counted(arguments: Any, told: str) -> None:
    assert common.count_kept(Path("here"), *arguments) == told


def test_an_error_says_once_what_is_kept_and_how_to_go_on() -> None:
    ending = common.Ending(["bench", "--output", "b"])
    ending.keeps(lambda: "1 measured prompt is kept in b")
    assert common._sentence(TrainingDataError("no such row."), ending) == (
        "Error: no such row; 1 measured prompt is kept in b; once this is mended, go on with: "
        "sparrow bench --output b",
        2,
    )


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
        assert "Exit codes: 0 done, 1 an fp32 text differs" in told
    codes = (0, common.NOT_IDENTICAL, common.BAD_INPUT, common.BAD_ROWS, common.RAN_OUT, common.INTERRUPTED)
    for code in (*codes, common.UNREAD, common.TERMINATED):
        assert f"| {code} |" in page


@needs_posix
@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_output_that_nobody_reads(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `sparrow … | head`."""
    reader, writer = os.pipe()
    os.close(reader)

    def write_rows() -> None:
        print("a line", flush=True)

    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patches, pytest.raises(typer.Exit) as ended:
        patches.setattr(sys, "stdout", pipe)
        if closed == "both":
            patches.setattr(sys, "stderr", pipe)
        with common.errors_as_sentences():
            write_rows()
    assert ended.value.exit_code == 141


def test_a_broken_pipe_of_another_kind_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, common.errors_as_sentences():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert ended.value.exit_code == 2 and capsys.readouterr().err == "Error: [Errno 32] Broken pipe\n"
